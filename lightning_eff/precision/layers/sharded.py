"""What sharded strategies, FSDP2 and DeepSpeed's ZeRO, change for converted layers: classes and parameters.

FSDP2's ``fully_shard`` derives a class from a module's own and gives the module that; outside of forward and backward
its parameters and their gradients are DTensors, of which a rank holds a part. ZeRO keeps gradients, and in stage 3
parameters, in buffers of its own. In forward and backward both hand the layers whole, plain weights.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn


def _wrapper(kind: type[nn.Module]) -> type[Any] | None:
    """Return what ``fully_shard`` has put in front of a module's own class, or None."""
    first = kind.__bases__[0]
    is_wrapper = any(ancestor.__name__ == "FSDPModule" for ancestor in first.__mro__)
    return first if is_wrapper and len(kind.__bases__) == 2 else None


def own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a module's class as it was before ``fully_shard``."""
    return kind if _wrapper(kind) is None else kind.__bases__[1]


def with_base(kind: type[Any], old: type[Any], new: type[Any]) -> type[Any]:
    """Return ``kind`` with ``new`` in place of its ancestor ``old``: what would have been derived from ``new``.

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
    """Return the shape of the whole parameter; ZeRO-3 leaves an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


class DeviceMesh(Protocol):
    """Names the processes a tensor is spread over."""

    device_type: str


class Sharded(Protocol):
    """Shows what is read of a DTensor."""

    device_mesh: DeviceMesh

    def to_local(self) -> Tensor:
        """Return this rank's part."""


def is_dtensor(x: object) -> TypeGuard[Sharded]:
    """Return whether ``x`` is a DTensor; torch.distributed.tensor is not imported to find out."""
    return type(x) not in (Tensor, nn.Parameter) and hasattr(x, "to_local") and hasattr(x, "device_mesh")
