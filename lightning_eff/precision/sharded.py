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

Named = list[tuple[str, Any]]
_AROUND: dict[tuple[type[Any], type[nn.Module]], type[nn.Module]] = {}


def _wrapper(kind: type[nn.Module]) -> type[Any] | None:
    """What ``fully_shard`` has put in front of a module's own class, or None."""
    first = kind.__bases__[0]
    is_wrapper = any(ancestor.__name__ == "FSDPModule" for ancestor in first.__mro__)
    return first if is_wrapper and len(kind.__bases__) == 2 else None


def own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A module's class as it was before ``fully_shard``."""
    return kind if _wrapper(kind) is None else kind.__bases__[1]


def put_in(kind: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with ``own`` in place of its own class: what ``fully_shard`` would have made of a module of ``own``."""
    wrapper = _wrapper(kind)
    if wrapper is None:
        return own
    if (wrapper, own) not in _AROUND:
        prefix = kind.__name__.removesuffix(own_class(kind).__name__)
        members = {key: kind.__dict__[key] for key in ("__deepcopy__", "__module__") if key in kind.__dict__}
        _AROUND[wrapper, own] = type(prefix + own.__name__, (wrapper, own), members)
    return _AROUND[wrapper, own]


def shape_of(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter; ZeRO-3 leaves an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def is_dtensor(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor; torch.distributed.tensor is not imported to find out."""
    return hasattr(x, "to_local") and hasattr(x, "device_mesh")


def current(model: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """``parameter``, or what stands in its place: Fabric shards a model after it has been converted."""
    if parameter.grad is not None or not parameter.requires_grad:
        return parameter
    path, _, key = name.rpartition(".")
    found = model.get_submodule(path)._parameters.get(key)
    return parameter if found is None else found


def gradients(parameters: Named) -> Named:
    """Names and gradients, where there are any: this rank's part, dense."""
    grads = ((name, p.grad.detach()) for name, p in parameters if p.grad is not None)
    parts = ((name, grad.to_local() if is_dtensor(grad) else grad) for name, grad in grads)
    dense = ((name, part._values() if part.is_sparse else part) for name, part in parts)
    return [(name, part) for name, part in dense if part.numel()]


def reduction_device(parameters: Iterable[Tensor]) -> torch.device | None:
    """Where the ranks that hold parts of ``parameters`` talk to each other; None if every rank holds all."""
    meshes = (p.device_mesh for p in parameters if is_dtensor(p))  # type: ignore[attr-defined]
    return next((torch.device(mesh.device_type) for mesh in meshes), None)


def on_any_rank(verdict: bool, device: torch.device) -> bool:
    """Whether ``verdict`` is true on any rank; one all-reduce of one number."""
    if not (dist.is_available() and dist.is_initialized()):
        return verdict
    flag = torch.tensor(float(verdict), device=device, dtype=torch.float32)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def names_of_all_ranks(names: list[str]) -> list[str]:
    """The union of the ranks' names, in order of appearance."""
    if not (dist.is_available() and dist.is_initialized()):
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
