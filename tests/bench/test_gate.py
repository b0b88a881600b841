"""`fedark bench gate` runs a real enclave from its start to its key, and says what the sandbox
costs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fedark.bench import _hardware, gate
from fedark.foundation.errors import SandboxUnavailable
from fedark.sandbox import survey


@pytest.mark.slow
def test_every_step_of_a_start_is_measured_and_the_sum_is_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        mode = survey().mode("landlock")
    except SandboxUnavailable as missing:
        pytest.skip(missing.what)
    for name, value in (("_STARTS", 1), ("_PAIRS", 2), ("_APPRAISALS", 20), ("_DEVICES", 2)):
        monkeypatch.setattr(gate, name, value)
    rows = {row.case: row for row in gate.rows()}
    steps = [rows[f"{text} ({mode})"].ours for text in gate._STEPS.values()]
    assert all(seconds > 0 for seconds in steps)
    assert rows[f"start to key released ({mode})"].ours == pytest.approx(sum(steps))
    slow = rows[f"LoRA step in the sandbox ({mode}), processor time"]
    assert slow.ratio is not None
    assert 0.5 < slow.ratio < 2
    assert rows["evidence appraised, one device"].ours > 0
    assert rows["evidence appraised, nonces on the disk, by the clock"].ours > 0


def test_real_evidence_of_hardware_is_measured_where_there_is_some(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hardware, "_SECONDS", 0.01)
    monkeypatch.delenv("FEDARK_VECTORS", raising=False)
    assert list(_hardware.rates()) == []
    monkeypatch.setenv("FEDARK_VECTORS", str(tmp_path))
    assert list(_hardware.rates()) == []
    monkeypatch.setenv("FEDARK_VECTORS", str(shared / "vectors"))
    rates = dict(_hardware.rates())
    assert list(rates) == ["Nitro document", "SEV-SNP report", "TDX quote, to its refusal"]
    assert all(0 < rate < 5000 for rate in rates.values()), (
        "a quote that is refused at once is not verified"
    )
