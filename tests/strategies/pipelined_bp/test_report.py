"""What a run says of its stages at the end."""

from __future__ import annotations

from lightning_eff.strategies.pipelined_bp import report
from lightning_eff.strategies.pipelined_bp.timeline import Sums, Timeline
from tests.strategies.pipelined_bp.handmade import CPU, HandMade


def test_nothing_done_is_no_division_by_zero() -> None:
    assert Sums().utilisation == Sums().per_micro_batch(1.0) == 0.0
    assert Timeline(0, CPU).spans() == []
    assert report.save_picture([([], Sums())], "nowhere") is None
    (line,) = report.verdict([([], Sums())] * 2, HandMade().weights, None)
    assert "0 updates" in line


def test_the_verdict_says_how_busy_the_stages_were() -> None:
    weights = HandMade(mitigation="sc").weights
    weights.updates = 50
    (one,) = report.verdict([([], Sums())], weights, None)
    assert "50 updates with the delays of 3 stages in one process" in one
    assert "up to 4 updates late. mitigation=sc" in one
    busy, idle = Sums(busy_s=9, wait_s=1), Sums(busy_s=6, wait_s=1, transfer_s=1, other_s=2)
    line, where = report.verdict([([], busy), ([], idle)], weights, "there.svg")
    assert "50 updates in 10.0 s. Stages computed 90%, 60% of the time (mean 75%;" in line
    assert "cannot exceed 89%)" in line  # 8 / (8 + 2 - 1)
    assert "One process would have computed for 15.0 s: 1.50x" in line
    assert where == "pipelined_bp: the schedule is drawn in there.svg"
