"""When a rank computed and when it waited: spans of real time, what they sum to, and a picture at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lightning_eff.strategies.pipelined_bp.gantt import Kind, Span

Activity = Literal["forward", "backward", "update", "wait", "transfer", "other"]
"""What a rank does at a time."""
SELDOM = 256
"""Micro-batches after which spans are summed up on CUDA if nobody has asked for them."""
KEPT = 64
"""Micro-batches whose spans are kept for the picture: the last ones."""
_DRAWN: dict[Activity, Kind] = {"forward": "forward", "backward": "backward", "update": "update", "wait": "wait"}
"""What the picture shows: sending and the rest are left out."""


@dataclass
class Sums:
    """Sums seconds and counts of one rank.

    Attributes:
        busy_s: forward, backward and update.
        wait_s: for messages.
        transfer_s: packing and handing over messages: what of a transfer does not hide behind computation.
        other_s: everything else, such as loading data, hooks and loggers.
        micro_batches: how many.
        staleness: updates between forward and backward of a sample, summed.
    """

    busy_s: float = 0.0
    wait_s: float = 0.0
    transfer_s: float = 0.0
    other_s: float = 0.0
    micro_batches: int = 0
    staleness: float = 0.0

    @property
    def utilisation(self) -> float:
        """Share of the time in which this rank computed."""
        whole = self.busy_s + self.wait_s + self.transfer_s + self.other_s
        return self.busy_s / whole if whole else 0.0

    def per_micro_batch(self, seconds: float) -> float:
        """Return the mean of a sum over the micro-batches."""
        return seconds / self.micro_batches if self.micro_batches else 0.0


@dataclass
class Timeline:
    """Records when one rank computed, waited and sent.

    On CUDA a span's ends are events of the stream, read when somebody asks for them.

    Attributes:
        stage: row in the picture.
        device: of the computation.
        run: sums of the run.
        recent: sums since the last record.
    """

    stage: int
    device: torch.device
    run: Sums = field(default_factory=Sums)
    recent: Sums = field(default_factory=Sums)

    def __post_init__(self) -> None:
        self._spans: list[tuple[Activity, int, Any, Any]] = []
        self._doing: tuple[Activity, int, Any] | None = None
        self._read = 0
        self._cuda = self.device.type == "cuda"
        self._zero: Any = None
        if self._cuda:
            torch.cuda.synchronize(self.device)
            self._zero, self._zero_s = torch.cuda.Event(enable_timing=True), time.perf_counter()
            self._zero.record()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def switch(self, kind: Activity, micro_batch: int) -> None:
        """End what the rank did until now, and begin ``kind``."""
        now = self._now()
        if self._doing is not None:
            self._spans.append((*self._doing, now))
        self._doing = (kind, micro_batch, now)

    def pause(self) -> None:
        """Count what follows (a validation, a checkpoint) nowhere."""
        if self._doing is not None:
            self._spans.append((*self._doing, self._now()))
        self._doing = None

    def count_micro_batch(self, staleness: int | None) -> None:
        """Count one more micro-batch, whose gradient was ``staleness`` updates late."""
        for sums in (self.run, self.recent):
            sums.micro_batches += 1
            sums.staleness += staleness or 0
        # On CUDA that waits for the device: seldom, and so often that events do not pile up where nobody records.
        if not self._cuda or self.run.micro_batches % SELDOM == 0:
            self._sum_up()

    def take_recent(self) -> Sums:
        """Return what there was since the last record, and begin the next."""
        self._sum_up()
        recent, self.recent = self.recent, Sums()
        return recent

    def _sum_up(self) -> None:
        if self._cuda and len(self._spans) > self._read:
            torch.cuda.synchronize(self.device)
        for i in range(self._read, len(self._spans)):
            kind, micro_batch, start, end = self._spans[i]
            start_s, end_s = self._seconds(start), self._seconds(end)
            self._spans[i] = (kind, micro_batch, start_s, end_s)
            for sums in (self.run, self.recent):
                if kind == "wait":
                    sums.wait_s += end_s - start_s
                elif kind == "transfer":
                    sums.transfer_s += end_s - start_s
                elif kind == "other":
                    sums.other_s += end_s - start_s
                else:
                    sums.busy_s += end_s - start_s
        oldest = self._spans[-1][1] - KEPT if self._spans else 0
        if len(self._spans) > 16 * KEPT:
            self._spans = [span for span in self._spans if span[1] >= oldest]
        self._read = len(self._spans)

    def _seconds(self, moment: Any) -> float:
        if isinstance(moment, float):
            return moment
        return float(self._zero_s + self._zero.elapsed_time(moment) / 1000)

    def spans(self) -> list[Span]:
        """Return the spans of the last micro-batches, for the picture."""
        self._sum_up()
        if not self._spans:
            return []
        oldest = self._spans[-1][1] - KEPT
        spans: list[Span] = []
        for activity, micro_batch, start_s, end_s in self._spans:
            kind = _DRAWN.get(activity)
            if kind is not None and micro_batch >= oldest:
                spans.append(Span(self.stage, kind, micro_batch, start_s, end_s))
        return spans
