"""The schedule of pipelined backpropagation: which stage does what when, and how late gradients are.

The layers lie on S stages. A stage updates its weights as soon as a gradient reaches it, so it is never idle; but the
gradient of a sample comes D_s updates after its forward pass (:func:`stage_delay`), k (S - 1 - s) of them. What can be
done about that is in :mod:`lightning_eff.functional.staleness.mitigation`.

Legend: S ``stages``, s ``stage`` (0 is the first), D ``delay`` in updates, N ``samples`` (what is one forward and one
backward pass: a sample in the paper, a micro-batch here), M ``micro_batches`` between two flushes, k ``in_flight``.

References:
    Kosson, Chiley, Venigalla, Hestness, Köster, Pipelined Backpropagation at Scale: Training Large Models without
    Batches, MLSys 2021, arXiv:2003.11666. Only its abstract and introduction were at hand; that the delays are those of
    the schedule is tested.
Differs: a stage without a gradient yet does not step at all, so nothing advances while the pipeline fills. Schedules
    with other delays than the paper's (1F1B, or slack for jitter) are had by ``in_flight``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from lightning_eff.checks import Whole, check

PassKind = Literal["forward", "backward"]
FINE_GRAINED = 2
"""``in_flight`` of the paper's schedule: every stage does one forward and one backward per time step."""
COUNT = Whole(1)


class Operation(NamedTuple):
    """One pass of one sample through one stage.

    Attributes:
        kind: ``"forward"`` or ``"backward"``; a backward ends with the stage's update.
        sample: its number, from 0.
        version: updates of this stage before it.
        step: the time step it runs in.
    """

    kind: PassKind
    sample: int
    version: int
    step: int


def stage_delay(stage: int, stages: int, *, in_flight: int = FINE_GRAINED) -> int:
    """Return D_s, the updates of a stage between forward and backward pass of one sample: k (S - 1 - s).

    The stage keeps the activations of D_s + 1 samples. Sample i sees min(i, D_s): the pipeline is filling.

    Args:
        stage: s, 0 .. S - 1.
        stages: S, at least 1.
        in_flight: k, by how many samples a stage runs ahead of the next. 2 is the paper's fine-grained schedule, 1 is
            1F1B without flush (a stage does forwards and backwards in turn), more leaves slack for jitter (ours).

    Raises:
        ConfigurationError: an argument is out of its range.

    Example:
        >>> [stage_delay(stage, 4) for stage in range(4)]
        [6, 4, 2, 0]
        >>> [stage_delay(stage, 4, in_flight=1) for stage in range(4)]
        [3, 2, 1, 0]
    """
    stages, in_flight = check("stages", stages, COUNT), check("in_flight", in_flight, COUNT)
    stage = check("stage", stage, Whole(0, stages - 1, f"there are {stages}"))
    return in_flight * (stages - 1 - stage)  # D_s = k (S - 1 - s)


def utilisation(samples: int, stages: int, *, fine_grained: bool = True) -> float:
    """Return the share of the time the stages work when the pipeline is filled and drained once for N samples.

        fine-grained: N / (N + 2 S - 2)        one after the other: N / (N + S - 1)

    Pipelined backpropagation drains once in a run (N is all its samples), a synchronous pipeline for every update.

    Args:
        samples: N.
        stages: S.
        fine_grained: a stage does one forward and one backward at the same time; else one of them (GPipe, 1F1B).

    Raises:
        ConfigurationError: an argument is below 1.

    Example:
        >>> round(utilisation(128, 34), 3)
        0.66
    """
    samples, stages = check("samples", samples, COUNT), check("stages", stages, COUNT)
    idle = (2 if fine_grained else 1) * (stages - 1)  # 2 S - 2 or S - 1 time steps, to fill and to drain
    return samples / (samples + idle)


def flush_bubble(stages: int, micro_batches: int) -> float:
    """Return the bubble fraction of GPipe and 1F1B with flush, (S - 1) / (M + S - 1).

    Raises:
        ConfigurationError: an argument is below 1.

    Example:
        >>> flush_bubble(4, 9)
        0.25
    """
    stages, micro_batches = check("stages", stages, COUNT), check("micro_batches", micro_batches, COUNT)
    return (stages - 1) / (micro_batches + stages - 1)  # (S - 1) / (M + S - 1)


def pipeline_schedule(samples: int, stages: int, *, in_flight: int = FINE_GRAINED) -> list[list[Operation]]:
    """Return for every stage its operations in order, with weight version and time step.

    The order follows from the delay alone: sample i goes forward when the stage has done max(0, i - D_s) updates, and
    backward when it has done i. An operation runs at the earliest step that its stage and its neighbour allow; what a
    step sends arrives in the next. With ``in_flight`` of 2 or more a stage does a forward and then a backward in one
    step, as in the paper; with 1 it does one of them.

    Args:
        samples: N, at least 1.
        stages: S, at least 1.
        in_flight: as in :func:`stage_delay`.

    Raises:
        ConfigurationError: an argument is below 1.

    Example:
        >>> first, last = pipeline_schedule(2, 2)
        >>> [(operation.kind, operation.sample, operation.step) for operation in first]
        [('forward', 0, 0), ('forward', 1, 1), ('backward', 0, 2), ('backward', 1, 3)]
        >>> [operation.version for operation in last]
        [0, 0, 1, 1]
    """
    samples = check("samples", samples, Whole(1, 2**20, "every operation is listed"))
    stages, in_flight = check("stages", stages, COUNT), check("in_flight", in_flight, COUNT)
    waiting = [_order(samples, stage_delay(stage, stages, in_flight=in_flight))[::-1] for stage in range(stages)]
    done: list[list[Operation]] = [[] for _ in range(stages)]
    steps: dict[tuple[int, PassKind, int], int] = {}
    while any(waiting):
        for stage in (*range(stages), *reversed(range(stages))):
            while waiting[stage]:
                kind, sample, version = waiting[stage][-1]
                neighbour = stage - 1 if kind == "forward" else stage + 1
                sent = steps.get((neighbour, kind, sample)) if 0 <= neighbour < stages else -1
                if sent is None:
                    break
                # No earlier than the step after the neighbour's, no earlier than the stage is free.
                free = _free_step(done[stage], kind, pairs=in_flight >= FINE_GRAINED)
                steps[stage, kind, sample] = step = max(sent + 1, free)
                done[stage].append(Operation(kind, sample, version, step))
                waiting[stage].pop()
    return done


def _order(samples: int, delay: int) -> list[tuple[PassKind, int, int]]:
    """(kind, sample, version) of a stage's operations in order."""
    order: list[tuple[PassKind, int, int]] = []
    for turn in range(samples + delay):
        if turn < samples:
            order.append(("forward", turn, max(0, turn - delay)))  # version max(0, i - D_s)
        if turn >= delay:
            order.append(("backward", turn - delay, turn - delay))  # version i
    return order


def _free_step(done: list[Operation], kind: PassKind, *, pairs: bool) -> int:
    """The first step a stage can do its next operation in: a backward shares the step of the forward before it."""
    if not done:
        return 0
    shares = pairs and done[-1].kind == "forward" and kind == "backward"
    return done[-1].step + (not shares)
