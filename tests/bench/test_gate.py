"""`fedark bench gate` runs a real enclave from its start to its key, and says what the sandbox costs."""

from __future__ import annotations

import pytest

from fedark.bench import gate
from fedark.errors import SandboxUnavailable
from fedark.sandbox import survey


@pytest.mark.slow
def test_every_step_of_a_start_is_measured_and_the_sum_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
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
