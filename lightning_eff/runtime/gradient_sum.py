"""Gradients summed over the ranks in flat buckets, once per step.

A rank may compute fewer micro-batches than another, so nothing may wait for a rank inside the micro-batch loop:
gradients are summed once per step, explicitly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["GradientSum"]

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
    """Group parameters in reverse (backward finishes them so), of one dtype and device, up to ``limit`` bytes."""
    found: dict[tuple[torch.dtype, torch.device], list[list[nn.Parameter]]] = {}
    for p in reversed(list(parameters)):
        groups = found.setdefault((p.dtype, p.device), [[]])
        if sum(q.numel() * q.element_size() for q in groups[-1]) >= limit:
            groups.append([])
        groups[-1].append(p)
    return [group for groups in found.values() for group in groups]


class GradientSum:
    """Sums every gradient over the ranks, and with it a few numbers, in as few messages as there are buckets.

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
        """Return whether the sum was made for these and none has been moved, resized or cast since."""
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

    def nonfinite_parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose summed gradient holds NaN or Inf: the same on every rank."""
        sizes = ((bucket, sum(p.numel() for p in bucket.parameters)) for bucket in self.buckets)
        suspects = [bucket for bucket, size in sizes if not bool(bucket.buffer[:size].sum().isfinite())]
        pairs = [pair for bucket in suspects for pair in zip(bucket.parameters, bucket.slices, strict=True)]
        return [p for p, part in pairs if not bool(part.isfinite().all())]

    def name_nonfinite_ranks(self, losses: Sequence[Tensor]) -> list[str]:
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
