"""Writes docs/enclave-states.md from the table of an enclave's calls: `make states`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedark.enclave.order import TABLES, If, Region, State, Step

PAGE = Path(__file__).with_name("enclave-states.md")
_REGIONS = {
    "run": "How far the run is",
    "memory": "What its memory holds",
    "masks": "The masked session",
}
_HEAD = """\
# The order of an enclave's calls

Made by `make states` from the table in `fedark/enclave/order.py`, which the enclaves run by.

An enclave is in one state of each region of its role. A call is legal if every region that knows it
has it in its present state; else the enclave refuses it and nothing changes. A call without an
arrow changes no state. *sealed*: the reply carries the enclave's checkpoint, from which it goes on
after its process has ended; a region marked *volatile* begins again at its first state then.

Calls that change no state are not in the diagrams. What the table does not say, the handlers check:
who sent a message, for which round and model, and whether it is the one that came before.
"""


def _follows(step: Step, state: State) -> dict[State, str]:
    if isinstance(step.next, If):
        test = step.next.test.replace("_", " ")
        return {step.next.then: f" [{test}]", step.next.otherwise: f" [not {test}]"}
    return {step.next or state: ""}


def _diagram(region: Region) -> Iterator[str]:
    yield "```mermaid\nstateDiagram-v2"
    for state in region.steps:
        yield f"    {state.name} : {state.value}"
    yield f"    [*] --> {region.start.name}"
    edges: dict[tuple[State, State], list[str]] = {}
    for state, steps in region.steps.items():
        for call, step in steps.items():
            for following, condition in _follows(step, state).items():
                if following is not state:
                    edges.setdefault((state, following), []).append(call + condition)
    for (before, after), calls in edges.items():
        yield f"    {before.name} --> {after.name} : {' / '.join(calls)}"
    yield "```\n"


def _table(region: Region) -> Iterator[str]:
    yield "| state | calls | handler | next state | sealed |\n|---|---|---|---|---|"
    for state, steps in region.steps.items():
        rows: dict[Step, list[str]] = {}
        for call, step in steps.items():
            rows.setdefault(step, []).append(f"`{call}`")
        for step, calls in rows.items():
            following = ", ".join(
                after.value + condition for after, condition in _follows(step, state).items()
            )
            handler = f"`{step.handler}`" if step.handler else "of another region"
            sealed = "yes" if step.seals else ""
            yield f"| {state.value} | {', '.join(calls)} | {handler} | {following} | {sealed} |"
    yield ""


def page() -> str:
    """The whole page."""
    lines, shown = [_HEAD], list[Region]()
    for (role, mode), table in TABLES.items():
        lines.append(f"## {role.capitalize()}, updates {mode}\n")
        for name, region in table.items():
            volatile = "" if region.lasts else " (volatile)"
            lines.append(f"### {_REGIONS[name]}{volatile}: {role}, {mode}\n")
            if any(region is other for other in shown):
                lines.append("As above.\n")
                continue
            shown.append(region)
            lines += [*_diagram(region), *_table(region)]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
