"""The look at the gradients of a step before they reach a parameter, the same verdict on every rank.

Gradients are whole and plain, or parts: FSDP2 leaves a rank DTensors, ZeRO keeps gradients in buffers of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eff.integration.attached import trainer_of
from lightning_eff.precision.layers.sharded import is_dtensor
from lightning_eff.runtime.ranks import has_group


class ZeroEngine(Protocol):
    """Shows what is read of DeepSpeed's engine around a model."""

    device: torch.device
    module: nn.Module
    optimizer: Any

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the optimizer steps after this micro-batch."""


Named = list[tuple[str, Tensor]]
"""Names and parameters."""


def broken_gradients(parameters: Named, engine: ZeroEngine | None = None) -> list[str]:
    """Return the names of the parameters whose gradient is not finite, the same on every rank.

    Every element is looked at, by the sums of the gradients; a sum that is not finite is looked into. Gradients are
    already reduced here: all ranks see the same, unless a strategy leaves each a part of them. Then the ranks ask
    each other.

    Args:
        parameters: of the models.
        engine: DeepSpeed's, see :func:`zero_engine`.
    """
    if engine is not None and not engine.is_gradient_accumulation_boundary():
        return []
    if engine is not None and hasattr(engine.optimizer, "has_overflow"):
        return zero_broken(engine)
    broken = broken_names(parameters)
    device = engine.device if engine is not None else reduction_device(p for _, p in parameters)
    if device is None or not on_any_rank(bool(broken), device):
        return broken
    return names_of_all_ranks(broken)


def _part(name: str, grad: Tensor) -> tuple[str, Tensor]:
    """Return this rank's part of a gradient, dense."""
    part = grad.to_local() if is_dtensor(grad) else grad.detach()
    return name, part._values() if part.is_sparse else part


def broken_names(parameters: Named) -> list[str]:
    """Return the names of the parameters of whose gradient this rank's part holds NaN or Inf; one synchronisation.

    The sum of a tensor with such an element is not finite. One that overflows is looked into and found to be sound.
    """
    found = [_part(name, p.grad) for name, p in parameters if p.grad is not None]
    found = [(name, grad) for name, grad in found if grad.numel()]
    if not found:
        return []
    grads = [grad for _, grad in found]
    on_gpu = all(grad.is_cuda for grad in grads)
    sums = torch._foreach_norm(grads) if on_gpu else [grad.sum() for grad in grads]  # on a GPU one launch for all
    if bool(torch.isfinite(torch.stack([value.float() for value in sums])).all()):
        return []
    return [name for name, grad in found if not bool(torch.isfinite(grad).all())]


def reduction_device(parameters: Iterable[Tensor]) -> torch.device | None:
    """Return where the ranks that hold parts of ``parameters`` talk to each other; None if every rank holds all."""
    meshes = (p.device_mesh for p in parameters if is_dtensor(p))
    return next((torch.device(mesh.device_type) for mesh in meshes), None)


def on_any_rank(verdict: bool, device: torch.device) -> bool:
    """Return whether ``verdict`` is true on any rank; one all-reduce of one number."""
    if not has_group():
        return verdict
    flag = torch.tensor(float(verdict), device=device, dtype=torch.float32)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def names_of_all_ranks(names: list[str]) -> list[str]:
    """Return the union of the ranks' names, in order of appearance."""
    if not has_group():
        return names
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, names)
    return list(dict.fromkeys(name for part in parts for name in part))


def zero_engine(model: object) -> ZeroEngine | None:
    """Return DeepSpeed's engine around a LightningModule, or None."""
    engine = getattr(getattr(trainer_of(model), "strategy", None), "model", None)
    return engine if hasattr(engine, "is_gradient_accumulation_boundary") else None


def zero_broken(engine: ZeroEngine) -> list[str]:
    """Return the names of the parameters whose reduced gradient is not finite, the same on every rank.

    ZeRO's own look for overflows tells whether there are any: a pass over the rank's part and one all-reduce.
    """
    if not engine.optimizer.has_overflow():
        return []
    from deepspeed.utils import safe_get_full_grad

    grads = ((name, safe_get_full_grad(p)) for name, p in engine.module.named_parameters() if p.requires_grad)
    return [name for name, grad in grads if grad is not None and not bool(torch.isfinite(grad).all())] or ["(unknown)"]
