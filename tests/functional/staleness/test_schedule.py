"""The schedule against what its delays promise, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.staleness.mitigation import spectrain_horizons
from lightning_eff.functional.staleness.schedule import flush_bubble, pipeline_schedule, stage_delay, utilisation


def test_delays_and_horizons() -> None:
    for stages in (1, 2, 5, 8):
        for s in range(stages):
            assert stage_delay(s, stages) == 2 * (stages - 1 - s)
            assert stage_delay(s, stages, in_flight=1) == stages - 1 - s
            assert spectrain_horizons(s, stages) == (2 * (stages - 1) - s, s)
            assert spectrain_horizons(s, stages, in_flight=1) == (s // 2 + stages - s - 1, s // 2)
        assert sum(stage_delay(s, stages) + 1 for s in range(stages)) == stages**2  # activations kept by all stages


SIZES = {"samples": st.integers(1, 40), "stages": st.integers(1, 7)}


@given(**SIZES, in_flight=st.integers(1, 4))
def test_a_schedule_keeps_its_promises(samples: int, stages: int, in_flight: int) -> None:
    plan = pipeline_schedule(samples, stages, in_flight=in_flight)
    at = {(s, op.kind, op.sample): op.step for s, operations in enumerate(plan) for op in operations}
    for s, operations in enumerate(plan):
        late = stage_delay(s, stages, in_flight=in_flight)
        assert sorted((op.kind, op.sample) for op in operations) == sorted(
            (kind, i) for kind in ("forward", "backward") for i in range(samples)
        )
        updates, kept, most_kept = 0, 0, 0
        for op in operations:
            assert op.version == updates
            assert op.version == (op.sample if op.kind == "backward" else max(0, op.sample - late))
            neighbour = at.get(
                (s - 1, "forward", op.sample) if op.kind == "forward" else (s + 1, "backward", op.sample)
            )
            assert neighbour is None or neighbour < op.step
            updates += op.kind == "backward"
            kept += 1 if op.kind == "forward" else -1
            assert kept >= 0
            most_kept = max(most_kept, kept)
        assert most_kept == min(late + 1, samples)
        for i in range(samples):  # a backward may share the step of its forward, but not of another backward
            assert at[s, "backward", i] >= at[s, "forward", i] + (in_flight == 1)
        slots = [(op.step, op.kind if in_flight > 1 else "any") for op in operations]
        assert len(set(slots)) == len(slots)
        assert [op.step for op in operations] == sorted(op.step for op in operations)


@given(**SIZES)
def test_the_papers_schedule_to_the_step(samples: int, stages: int) -> None:
    plan = pipeline_schedule(samples, stages)
    for s, operations in enumerate(plan):
        for op in operations:
            assert op.step == (op.sample + s if op.kind == "forward" else op.sample + 2 * (stages - 1) - s)
    steps = 1 + max(op.step for operations in plan for op in operations)
    assert samples / steps == pytest.approx(utilisation(samples, stages))


@given(samples=st.integers(8, 40), stages=st.integers(1, 8))
def test_1f1b_is_as_busy_as_its_formula(samples: int, stages: int) -> None:
    plan = pipeline_schedule(samples, stages, in_flight=1)
    steps = 1 + max(op.step for operations in plan for op in operations)
    assert 2 * samples / steps == pytest.approx(utilisation(samples, stages, fine_grained=False))
    assert 1 - 2 * samples / steps == pytest.approx(flush_bubble(stages, samples))


@given(**SIZES, in_flight=st.integers(1, 3))
def test_spectrain_looks_at_one_moment(samples: int, stages: int, in_flight: int) -> None:
    """All stages predict what they will be when stage 0 has the gradient: for k < 3 to the time step."""
    plan = pipeline_schedule(samples + 3 * stages, stages, in_flight=in_flight)
    ends = {(s, op.sample): op.step for s, operations in enumerate(plan) for op in operations if op.kind == "backward"}
    for s, operations in enumerate(plan):
        forward, backward = spectrain_horizons(s, stages, in_flight=in_flight)
        for op in operations[: 2 * samples]:
            if op.version == 0:
                continue
            target = op.version + (forward if op.kind == "forward" else backward)
            assert target == op.sample + backward
            moment = ends[0, op.sample]
            there = sum(step < moment for (stage, _), step in ends.items() if stage == s)
            assert 0 <= there - op.sample <= in_flight * s
            if in_flight < 3:
                assert abs(there - target) <= (in_flight == 1)


@pytest.mark.parametrize(("samples", "stages", "expected"), [(1, 34, 0.0149), (128, 34, 0.660), (128, 169, 0.276)])
def test_utilisation(samples: int, stages: int, expected: float) -> None:
    assert utilisation(samples, stages) == pytest.approx(expected, abs=5e-4)
    assert utilisation(1, stages) == pytest.approx(1 / (2 * stages - 1))
    assert utilisation(samples, stages, fine_grained=False) == pytest.approx(1 - flush_bubble(stages, samples))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stage_delay(3, 3), "stage=3 is not allowed; it must be a whole number from 0 to 2"),
        (lambda: stage_delay(-1, 3), "stage=-1"),
        (lambda: stage_delay(0, 0), "stages=0"),
        (lambda: stage_delay(0, 3, in_flight=0), "in_flight=0"),
        (lambda: utilisation(0, 3), "samples=0"),
        (lambda: flush_bubble(3, 0), "micro_batches=0"),
        (lambda: pipeline_schedule(0, 3), "samples=0"),
        (lambda: pipeline_schedule(3, 0), "stages=0"),
    ],
)
def test_what_is_not_allowed(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()
