"""Collectives of our strategies: gradients summed in flat buckets, and Lightning's own kept out of the way.

A rank may compute fewer micro-batches than another, so nothing may wait for a rank inside the micro-batch loop:
gradients are summed once per step, explicitly, and Lightning's look for SIGTERM on other ranks moves to the same place.
What a rank logged in a micro-batch another may not have logged at all: that is found out before it is averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.runtime.patches import Undo, replaced

__all__ = ["GradientSum", "compare_logs_between_ranks", "look_for_sigterm_once_per_window"]

BUCKET_BYTES = 25 << 20
"""Gradients that travel together; the size DistributedDataParallel uses."""


@dataclass
class _Bucket:
    """Gradients of one dtype side by side in one buffer, and room for numbers behind them."""

    parameters: list[nn.Parameter]
    buffer: Tensor

    @property
    def slices(self) -> Sequence[Tensor]:
        """A view of the buffer for each parameter, in its shape."""
        sizes = [p.numel() for p in self.parameters]
        parts = self.buffer[: sum(sizes)].split(sizes)
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]


def _buckets(parameters: Iterable[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Parameters in reverse (the order in which backward finishes them), of one dtype and device, up to ``limit``."""
    found: dict[tuple[torch.dtype, torch.device], list[list[nn.Parameter]]] = {}
    for p in reversed(list(parameters)):
        groups = found.setdefault((p.dtype, p.device), [[]])
        if sum(q.numel() * q.element_size() for q in groups[-1]) >= limit:
            groups.append([])
        groups[-1].append(p)
    return [group for groups in found.values() for group in groups]


class GradientSum:
    """The sum of every gradient over the ranks, and with it of a few numbers, in as few messages as buckets.

    A parameter without a gradient counts as zero; one that has none on any rank keeps none. Gradients are divided by
    the number of ranks before they are summed, as DistributedDataParallel does, so that equal gradients give equal
    bits.

    Args:
        parameters: the same on every rank, in the same order.
        numbers: how many numbers travel along.
        bucket_bytes: see :data:`BUCKET_BYTES`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], numbers: int, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self._forms = [(p.shape, p.dtype, p.device) for p in self.parameters]
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        groups = _buckets(self.parameters, bucket_bytes)
        first = next((i for i, group in enumerate(groups) if group[0].dtype is torch.float32), None)
        if first is None:
            groups, first = [[], *groups], 0
        self._tail = numbers + len(self.parameters)
        self.buckets = []
        for i, group in enumerate(groups):
            size = sum(p.numel() for p in group) + (self._tail if i == first else 0)
            dtype = group[0].dtype if group else torch.float32
            self.buckets.append(_Bucket(group, torch.zeros(size, dtype=dtype, device=device)))
        self._carrier = self.buckets[first]

    def fits(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether it was made for these, and they have not become others since: moved, resized, of another dtype."""
        return len(parameters) == len(self.parameters) and all(
            p is mine and (p.shape, p.dtype, p.device) == form
            for p, mine, form in zip(parameters, self.parameters, self._forms, strict=True)
        )

    def __call__(self, numbers: Sequence[float], within: AbstractContextManager[None] | None = None) -> list[float]:
        """Sum over the ranks; return the sums of ``numbers``. :meth:`write_back` gives the gradients.

        Args:
            numbers: of this rank.
            within: what the all-reduce runs in, for instance a :class:`~lightning_eff.runtime.roll_call.RollCall`.
        """
        world = dist.get_world_size()
        for bucket in self.buckets:
            if bucket.parameters:
                _fill(bucket, 1 / world)
        flags = [float(p.grad is not None) for p in self.parameters]
        tail = self._carrier.buffer[-self._tail :]
        tail.copy_(torch.tensor([*numbers, *flags], dtype=torch.float32, device="cpu"))
        # The carrier first: what it says decides what becomes of the others.
        order = sorted(self.buckets, key=lambda bucket: bucket is not self._carrier)
        with within or nullcontext():
            for work in [dist.all_reduce(bucket.buffer, async_op=True) for bucket in order]:
                work.wait()
        sums: list[float] = tail.tolist()
        self._used = {id(p) for p, flag in zip(self.parameters, sums[len(numbers) :], strict=True) if flag}
        return sums[: len(numbers)]

    def broken(self) -> list[nn.Parameter]:
        """Parameters whose summed gradient holds NaN or Inf: the same on every rank."""
        sizes = ((bucket, sum(p.numel() for p in bucket.parameters)) for bucket in self.buckets)
        suspects = [bucket for bucket, size in sizes if not bool(bucket.buffer[:size].sum().isfinite())]
        pairs = [pair for bucket in suspects for pair in zip(bucket.parameters, bucket.slices, strict=True)]
        return [p for p, part in pairs if not bool(part.isfinite().all())]

    def breakers(self, losses: Sequence[Tensor]) -> list[str]:
        """Name the ranks whose own gradients hold NaN or Inf, and their first micro-batch whose loss does; collective.

        Args:
            losses: of this rank's micro-batches.
        """
        bad = [i for i, loss in enumerate(losses) if not bool(loss.isfinite())]
        own = any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in self.parameters)
        where: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(where, (own, bad))
        return [
            f"rank {rank}" + (f", micro-batch {found[0]}" if found else "")
            for rank, (is_broken, found) in enumerate(where)
            if is_broken
        ]

    @torch.no_grad()
    def write_back(self, factor: float = 1.0) -> None:
        """Put the mean over the ranks, times ``factor``, into ``.grad``."""
        for bucket in self.buckets:
            if factor != 1.0 and bucket.parameters:
                size = sum(p.numel() for p in bucket.parameters)
                bucket.buffer[:size].mul_(factor)
            for p, part in zip(bucket.parameters, bucket.slices, strict=True):
                if id(p) not in self._used:
                    continue
                if p.grad is None or p.grad.layout is not torch.strided:
                    p.grad = part.clone()
                else:
                    p.grad.copy_(part)


@torch.no_grad()
def _fill(bucket: _Bucket, factor: float) -> None:
    for p, part in zip(bucket.parameters, bucket.slices, strict=True):
        if p.grad is None:
            part.zero_()
        else:
            grad = p.grad if p.grad.layout is torch.strided else p.grad.to_dense()
            torch.mul(grad, factor, out=part)


def look_for_sigterm_once_per_window(trainer: Any) -> Undo:
    """Let Lightning ask for SIGTERM on other ranks once per optimizer step instead of once per micro-batch.

    Since 2.5.2 every micro-batch begins with a broadcast from rank 0; a straggler there makes all ranks wait.
    Lightning's own also passes over any error of that broadcast, and with it over a lost rank.
    """
    loop = trainer.fit_loop.epoch_loop
    ask = getattr(type(loop), "_broadcast_sigterm_tensor", None)
    if ask is None:
        return lambda: None

    def once_per_window() -> None:
        if loop.batch_progress.current.ready % trainer.accumulate_grad_batches:
            return
        received = torch.tensor([int(trainer.received_sigterm)], dtype=torch.int64, device=trainer.strategy.root_device)
        dist.broadcast(received, src=0)
        if int(received):
            ask(loop)  # on every rank: it raises what ends the run

    return replaced(loop, "_broadcast_sigterm_tensor", once_per_window)


def compare_logs_between_ranks(trainer: Any, method: str) -> Undo:
    """At the end of an epoch, make sure that all ranks have logged the same values before Lightning averages them.

    Lightning takes the mean over the ranks of one value after the other, in the order in which they were first logged.
    A value that a rank logs only in micro-batches it has dropped would make the others wait for it for ever, and
    another order would mix the values up. One small message per epoch.

    Raises:
        UnsupportedCombinationError: at the end of the epoch, on every rank, if a value is missing on one of them.
    """
    connector = trainer._logger_connector
    end = type(connector).epoch_end_reached

    def compare_first() -> None:
        if trainer.training:
            _bring_in_one_order(trainer.fit_loop._results, method)
        end(connector)

    return replaced(connector, "epoch_end_reached", compare_first)


def _bring_in_one_order(results: Any, method: str) -> None:
    own = [key for key, value in results.valid_items() if value.meta.on_epoch and _is_averaged(value)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for key in sorted(set().union(*everyone)):
        if without := [rank for rank, keys in enumerate(everyone) if key not in keys]:
            hook, _, name = key.partition(".")
            raise UnsupportedCombinationError(
                f"self.log({name!r}, ...) in {hook} was called on other ranks in this epoch and never on rank "
                f"{without[0]}, which under {method!r} may have dropped those micro-batches; its mean over the ranks "
                "cannot be taken. Log it in every micro-batch, or with sync_dist=False."
            )
    if any(keys != own for keys in everyone):
        for key in everyone[0]:
            results[key] = results.pop(key)


def _is_averaged(value: Any) -> bool:
    """Whether Lightning, or a metric object itself, goes to the other ranks for it."""
    sync = value.meta.sync
    return not value.is_tensor or (sync.should and not sync.rank_zero_only)
