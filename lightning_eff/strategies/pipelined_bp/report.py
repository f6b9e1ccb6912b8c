"""What a run says at its end: how busy the stages were, what a synchronous pipeline would have been, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_eff.functional.staleness.schedule import flush_bubble
from lightning_eff.runtime.figures import console
from lightning_eff.strategies.pipelined_bp.gantt import Span, schedule_svg
from lightning_eff.strategies.pipelined_bp.timeline import Sums
from lightning_eff.strategies.pipelined_bp.weights import Weights

Timelines = Sequence[tuple[list[Span], Sums]]
FILE = "pipeline_schedule.svg"
SHOWN = 16
"""Micro-batches in the picture."""


def save_picture(timelines: Timelines, folder: str) -> str | None:
    """Draw the last micro-batches, and return the path of the file, or None if nothing was recorded."""
    spans = [span for recorded, _ in timelines for span in recorded]
    if not spans:
        return None
    newest = max(span.micro_batch for span in spans)
    spans = [span for span in spans if span.micro_batch > newest - SHOWN]
    Path(folder).mkdir(parents=True, exist_ok=True)
    labels = [f"rank {len(timelines) - 1 - position}" for position in range(len(timelines))]
    path = Path(folder) / FILE
    path.write_text(schedule_svg(spans, title="pipelined_bp: the last micro-batches", labels=labels), encoding="utf-8")
    return str(path)


def verdict(timelines: Timelines, weights: Weights, picture: str | None) -> list[str]:
    """Return the lines that tell people how busy the stages were.

    Args:
        timelines: of every position, the first first.
        weights: of the last position.
        picture: where it is.
    """
    sums = [own for _, own in timelines]
    if len(sums) == 1:
        stages = len(weights.stages)
        first = weights.stages[0].delay
        return [
            (
                f"pipelined_bp: {weights.updates} updates with the delays of {stages} stages in one process; the first "
                f"stage's gradients were up to {first} updates late. mitigation={weights.mitigation}."
            )
        ]
    busy = [own.utilisation for own in sums]  # u_p, of every position
    mean = sum(busy) / len(busy)
    seconds = max(own.busy_s + own.wait_s + own.transfer_s + own.other_s for own in sums)
    alone = sum(own.busy_s for own in sums)
    # A pipeline that is flushed after M = 8 micro-batches: u <= M / (M + P - 1).
    flush = 1 - flush_bubble(len(sums), 8)
    lines = [
        (
            f"pipelined_bp: {weights.updates} updates in {seconds:.1f} s. Stages computed "
            f"{', '.join(f'{share:.0%}' for share in busy)} of the time (mean {mean:.0%}; a synchronous pipeline with "
            f"8 micro-batches per batch cannot exceed {flush:.0%}). One process would have computed for {alone:.1f} s: "
            f"{alone / max(seconds, 1e-9):.2f}x. mitigation={weights.mitigation}."
        )
    ]
    return lines + ([f"pipelined_bp: the schedule is drawn in {picture}"] if picture else [])


def print_verdict(timelines: Timelines, weights: Weights, folder: str | None) -> None:
    """Print how busy the stages were, and draw the schedule.

    Args:
        timelines: of every position, the first first.
        weights: of the last position.
        folder: for the picture; None for none.
    """
    picture = None if folder is None else save_picture(timelines, folder)
    for line in verdict(timelines, weights, picture):
        console().print(line, highlight=False, soft_wrap=True)
