"""How many bytes some layers keep for their backward pass, counted by autograd's own hooks.

The count asks nothing of the layers: it sees every tensor that autograd saves while one of them runs forward, so the
same function measures fp32, bf16-mixed and 4-bit layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Saved", "held_by_graph", "quantisable", "record_all", "record_saved"]


@dataclass
class Saved:
    """What was saved, by storage, so that a tensor saved twice counts once.

    Attributes:
        activations: storage address -> bytes of what depends on the micro-batch.
        weights: storage address -> bytes of copies of weights (casts, codes); parameters themselves count nowhere.
    """

    activations: dict[int, int] = field(default_factory=dict)
    weights: dict[int, int] = field(default_factory=dict)

    @property
    def activation_bytes(self) -> int:
        """Bytes that depend on the micro-batch."""
        return sum(self.activations.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of weight copies."""
        return sum(self.weights.values())


def quantisable(model: nn.Module, *, exempt_first_last: bool = True) -> list[str]:
    """Return the names of the linear and convolution layers, without the exempt first and last one.

    An embedding in front counts as the first layer.
    """
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    kept = found[1:-1] if exempt_first_last else found
    return [name for name, module in kept if not isinstance(module, nn.Embedding)]


def _is_weight_copy(tensor: Tensor, module: nn.Module) -> bool:
    """Whether a saved tensor holds the weight's values, transposed or not, up to a cast to bfloat16."""
    weight: Tensor = module.weight.detach()
    forms = [weight, weight.t()] if weight.dim() == 2 else [weight]
    return any(
        tensor.shape == form.shape and torch.allclose(tensor.detach().float(), form.float(), rtol=2**-7)
        for form in forms
    )


class _Counter:
    """Sorts saved tensors into a :class:`Saved`."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.saved = Saved()
        self.parameters = {p.untyped_storage().data_ptr() for p in parameters}

    def hooks(self, module: nn.Module | None = None) -> torch.autograd.graph.saved_tensors_hooks:
        """Return hooks that count, attributing copies of weights to ``module`` when it is given."""

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.parameters:
                of_weight = module is not None and _is_weight_copy(tensor, module)
                kind = self.saved.weights if of_weight else self.saved.activations
                kind[storage.data_ptr()] = storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


@contextmanager
def record_all(model: nn.Module) -> Iterator[Saved]:
    """Count everything saved for backward while the block runs, but ``model``'s parameters."""
    counter = _Counter(model.parameters())
    with counter.hooks():
        yield counter.saved


@contextmanager
def record_saved(layers: Iterable[nn.Module]) -> Iterator[Saved]:
    """Count what ``layers`` save for backward while the block runs.

    Args:
        layers: modules with a ``weight``; they are left as they were.
    """
    layers = list(layers)
    counter = _Counter(parameter for layer in layers for parameter in layer.parameters())
    active: list[torch.autograd.graph.saved_tensors_hooks] = []

    def enter(module: nn.Module, _inputs: Any) -> None:
        active.append(counter.hooks(module))
        active[-1].__enter__()

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        active.pop().__exit__(None, None, None)

    handles: list[Any] = []
    for layer in layers:
        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave, always_call=True)]
    try:
        yield counter.saved
    finally:
        for handle in handles:
            handle.remove()


def held_by_graph(loss: Tensor) -> dict[int, int]:
    """Return storage address -> bytes of tensors that hang on nodes of the graph as plain attributes.

    Autograd's hooks see what a function saves through them; this finds what it keeps in its context by itself.
    """
    found: dict[int, int] = {}
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
        for tensor in tree_leaves(list(getattr(node, "__dict__", {}).values())):
            if isinstance(tensor, Tensor):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found
