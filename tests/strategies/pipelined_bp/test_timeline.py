"""What a rank did, and for how long."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightning_eff.strategies.pipelined_bp import timeline
from lightning_eff.strategies.pipelined_bp.timeline import Sums, Timeline
from tests.strategies.pipelined_bp.handmade import CPU


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the time on."""
    now = [100.0]
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: now[0])

    def forth(seconds: float) -> None:
        now[0] += seconds

    return forth


def test_a_timeline_sums_what_was_done(clock: Callable[[float], None]) -> None:
    line = Timeline(1, CPU)
    line.pause()
    for i in range(3):
        for kind, seconds in (
            ("wait", 1),
            ("forward", 2),
            ("transfer", 4),
            ("backward", 8),
            ("update", 16),
            ("other", 32),
        ):
            line.switch(kind, i)  # type: ignore[arg-type]
            clock(seconds)
        line.count_micro_batch(staleness=i)
        line.pause()
        clock(1000)  # a validation counts nowhere
    recent = line.take_recent()
    assert (recent.busy_s, recent.wait_s, recent.transfer_s, recent.other_s) == (3 * 26, 3, 12, 96)
    assert (recent.micro_batches, recent.staleness) == (3, 3)
    assert recent.utilisation == 26 / 63
    assert recent.per_micro_batch(recent.staleness) == 1.0
    assert line.take_recent() == Sums()
    assert line.run == recent
    spans = line.spans()
    assert [(span.kind, span.end_s - span.start_s) for span in spans[:4]] == [
        ("wait", 1),
        ("forward", 2),
        ("backward", 8),
        ("update", 16),
    ]
    assert {span.micro_batch for span in spans} == {0, 1, 2}
    assert {span.stage for span in spans} == {1}


def test_a_long_run_keeps_its_last_micro_batches(clock: Callable[[float], None]) -> None:
    line = Timeline(0, CPU)
    for i in range(2000):
        line.switch("forward", i)
        clock(0.5)
        line.count_micro_batch(0)
    assert line.run.busy_s == 0.5 * 1999, "the last is still under way"
    assert len(line._spans) <= 16 * timeline.KEPT + 1
    assert {span.micro_batch for span in line.spans()} == set(range(1998 - timeline.KEPT, 1999))
