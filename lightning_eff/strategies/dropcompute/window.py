"""The micro-batches of one optimizer step on this rank, and what all ranks made of the steps so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_eff.functional.stragglers.threshold import starts_next

__all__ = ["Tallies", "Tally", "Window"]


@dataclass
class Window:
    """Holds the micro-batches of one optimizer step.

    Attributes:
        times: seconds of every micro-batch that was computed.
        losses: their losses, detached.
        offered: micro-batches so far, the dropped ones counted.
        started: when the step before it ended; later by as long as the clock was held.
        holds: how many have stopped the clock and not let it go on.
        held_at: when the first of them did.
    """

    times: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    offered: int = 0
    started: float = 0.0
    holds: int = 0
    held_at: float = 0.0

    def hold(self, now: float) -> None:
        """Stop the clock."""
        if self.holds == 0:
            self.held_at = now
        self.holds += 1

    def release(self, now: float) -> None:
        """Let the clock go on."""
        self.holds -= 1
        if self.holds == 0:
            self.started += now - self.held_at

    def goes_on(self, now: float, *, tau: float, least: int, with_data: bool) -> bool:
        """Return whether the next micro-batch is computed.

        Args:
            now: seconds of the clock.
            tau: compute threshold, seconds.
            least: micro-batches that are computed however late the rank is.
            with_data: count waiting for data as compute time.
        """
        elapsed = now - self.started if with_data else sum(self.times)
        return starts_next(elapsed, len(self.times), tau=tau, min_micro_batches=least)


@dataclass
class Tally:
    """Counts what all ranks did in the steps since it was last emptied; the same on every rank.

    Attributes:
        steps: optimizer steps.
        computed: micro-batches, all ranks together.
        dropped: micro-batches, all ranks together.
        seconds: wall time.
        waited_s: what the same steps would have taken had every rank computed all its micro-batches, those it dropped
            taking as long as its others did.
    """

    steps: int = 0
    computed: int = 0
    dropped: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0

    def add(self, counts: Sequence[float], elapsed_s: Sequence[float], offered: int, wall_s: float) -> None:
        """Count one step.

        Args:
            counts: micro-batches that every rank computed, k_n.
            elapsed_s: compute time of every rank, T_n.
            offered: micro-batches of the step on every rank, M.
            wall_s: wall time of the step.
        """
        # Had rank n computed all M: T_n M / k_n; the step would have lasted longer by max_n of it less max_n T_n.
        whole = [e * offered / k if k else 0.0 for e, k in zip(elapsed_s, counts, strict=True)]
        self.steps += 1
        self.computed += round(sum(counts))
        self.dropped += offered * len(counts) - round(sum(counts))
        self.seconds += wall_s
        self.waited_s += wall_s + max(whole) - max(elapsed_s)

    @property
    def drop_rate(self) -> float:
        """Share of micro-batches that was not computed."""
        return self.dropped / max(self.computed + self.dropped, 1)

    @property
    def speedup(self) -> float:
        """Computed samples per second, relative to waiting."""
        return (1 - self.drop_rate) * self.waited_s / self.seconds if self.seconds else 1.0


@dataclass
class Tallies:
    """Counts the steps of a model's training, of the run and since the last record.

    Attributes:
        total: of the training, those before a resume counted.
        run: of this run.
        recent: since figures were last published.
    """

    total: Tally = field(default_factory=Tally)
    run: Tally = field(default_factory=Tally)
    recent: Tally = field(default_factory=Tally)

    def add(self, counts: Sequence[float], elapsed_s: Sequence[float], offered: int, wall_s: float) -> None:
        """Count one step everywhere; see :meth:`Tally.add`."""
        for tally in (self.total, self.run, self.recent):
            tally.add(counts, elapsed_s, offered, wall_s)

    def begin_run(self) -> None:
        """Begin the counts of a run; those of the training go on."""
        self.run, self.recent = Tally(), Tally()

    def forget(self) -> None:
        """Begin all counts anew: what follows is another training."""
        self.total = Tally()
        self.begin_run()

    def take_recent(self) -> Tally:
        """Return what there was since the last record, and begin the next."""
        recent, self.recent = self.recent, Tally()
        return recent
