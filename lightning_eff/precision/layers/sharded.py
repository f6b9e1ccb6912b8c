"""What sharded strategies, FSDP2 and DeepSpeed's ZeRO, change for converted layers: classes, parameters, gradients.

FSDP2's ``fully_shard`` derives a class from a module's own and gives the module that; outside of forward and backward
its parameters and their gradients are DTensors, of which a rank holds a part. ZeRO keeps gradients, and in stage 3
parameters, in buffers of its own. In forward and backward both hand the layers whole, plain weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eff.runtime.ranks import has_group

Named = list[tuple[str, Any]]


def _wrapper(kind: type[nn.Module]) -> type[Any] | None:
    """What ``fully_shard`` has put in front of a module's own class, or None."""
    first = kind.__bases__[0]
    is_wrapper = any(ancestor.__name__ == "FSDPModule" for ancestor in first.__mro__)
    return first if is_wrapper and len(kind.__bases__) == 2 else None


def own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A module's class as it was before ``fully_shard``."""
    return kind if _wrapper(kind) is None else kind.__bases__[1]


def with_base(kind: type[Any], old: type[Any], new: type[Any]) -> type[Any]:
    """``kind`` with ``new`` in place of its ancestor ``old``: what would have been derived from ``new``.

    ``fully_shard`` and ``parametrize`` derive a class from a module's own, before a layer is converted or after.
    """
    if kind is old:
        return new
    bases = tuple(with_base(base, old, new) for base in kind.__bases__)
    if bases == kind.__bases__:
        return kind
    body = {key: value for key, value in kind.__dict__.items() if key not in ("__dict__", "__weakref__")}
    return type(kind.__name__, bases, body)


def shape_of(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter; ZeRO-3 leaves an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def is_dtensor(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor; torch.distributed.tensor is not imported to find out."""
    return type(x) not in (Tensor, nn.Parameter) and hasattr(x, "to_local") and hasattr(x, "device_mesh")


def _part(name: str, grad: Tensor) -> tuple[str, Tensor]:
    """This rank's part of a gradient, dense."""
    part = grad.to_local() if is_dtensor(grad) else grad.detach()  # type: ignore[attr-defined]
    return name, part._values() if part.is_sparse else part


def broken_names(parameters: Named) -> list[str]:
    """Names of the parameters of whose gradient this rank's part holds NaN or Inf; one pass, one synchronisation.

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
    """Where the ranks that hold parts of ``parameters`` talk to each other; None if every rank holds all."""
    meshes = (p.device_mesh for p in parameters if is_dtensor(p))  # type: ignore[attr-defined]
    return next((torch.device(mesh.device_type) for mesh in meshes), None)


def on_any_rank(verdict: bool, device: torch.device) -> bool:
    """Whether ``verdict`` is true on any rank; one all-reduce of one number."""
    if not has_group():
        return verdict
    flag = torch.tensor(float(verdict), device=device, dtype=torch.float32)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def names_of_all_ranks(names: list[str]) -> list[str]:
    """The union of the ranks' names, in order of appearance."""
    if not has_group():
        return names
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, names)
    return list(dict.fromkeys(name for part in parts for name in part))


# ------------------------------------------------------------------------------------------------------- DeepSpeed


def zero_engine(model: Any) -> Any | None:
    """DeepSpeed's engine around a LightningModule, or None."""
    engine = getattr(getattr(getattr(model, "_trainer", None), "strategy", None), "model", None)
    return engine if hasattr(engine, "is_gradient_accumulation_boundary") else None


def zero_broken(engine: Any) -> list[str]:
    """Names of the parameters whose reduced gradient is not finite, the same on every rank.

    ZeRO's own look for overflows tells whether there are any: a pass over the rank's part and one all-reduce.
    """
    if not engine.optimizer.has_overflow():
        return []
    from deepspeed.utils import safe_get_full_grad

    grads = ((name, safe_get_full_grad(p)) for name, p in engine.module.named_parameters() if p.requires_grad)
    return [name for name, grad in grads if grad is not None and not bool(torch.isfinite(grad).all())] or ["(unknown)"]
