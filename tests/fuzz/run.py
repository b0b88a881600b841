"""`make fuzz`: bring every parser to a million inputs, in as many slices as one has time for.

    python tests/fuzz/run.py [--inputs N] [--seconds S] [--fresh] [NAME...]

What was tried is counted in build/fuzz.json and gone on from; another seed each time. Failing
inputs are kept in build/fuzz/. The exit status is 1 if any input of any slice so far failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from engine import fuzz
from targets import PARSERS, targets

BUILD = Path("build")
_SLICE = 20_000


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz every parser.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a parser; all by default")
    parser.add_argument(
        "--inputs", type=int, default=1_000_000, help="how many each is to have had in all"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop then, and go on next time"
    )
    parser.add_argument("--fresh", action="store_true", help="count from zero")
    given = parser.parse_args()
    if unknown := set(given.names) - set(PARSERS):
        parser.error(
            f"no such parser: {', '.join(sorted(unknown))}; there are: {', '.join(PARSERS)}"
        )
    state = BUILD / "fuzz.json"
    counts = json.loads(state.read_text()) if state.exists() and not given.fresh else {}
    ends, found = time.monotonic() + given.seconds, targets()
    (BUILD / "fuzz").mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)  # a host says of every call why it refused it
    # In turn, the least tried first, so that a slice of time is spread over all.
    while time.monotonic() < ends:
        open_ = [
            name
            for name in given.names or PARSERS
            if counts.get(name, {}).get("inputs", 0) < given.inputs
        ]
        if not open_:
            break
        name = min(
            open_, key=lambda name: (counts.get(name, {}).get("inputs", 0), PARSERS.index(name))
        )
        entry = counts.setdefault(name, {"inputs": 0, "slices": 0, "seconds": 0.0, "failures": 0})
        wanted = min(_SLICE, given.inputs - entry["inputs"])
        begun = time.monotonic()
        done, failures = fuzz(found[name], wanted, seed=1 + entry["slices"], seconds=ends - begun)
        entry["inputs"] += done
        entry["slices"] += 1
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - begun, 1)
        entry["failures"] += len(failures)
        for failure in failures:
            digest = hashlib.sha256(failure.data).hexdigest()[:16]
            kept = BUILD / "fuzz" / f"{name.replace(' ', '-').replace(',', '')}-{digest}"
            kept.write_bytes(failure.data)
            print(f"{name}: {failure.what}; kept in {kept}", flush=True)
        state.write_text(json.dumps(counts, indent=1))
    for name in given.names or PARSERS:
        entry = counts.get(name, {"inputs": 0, "seconds": 0.0, "failures": 0})
        print(
            f"{name:<26} {entry['inputs']:>9} inputs {entry['seconds']:>8.1f} s"
            f" {entry['failures']:>3} failures"
        )
    return 1 if any(entry["failures"] for entry in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
