"""What passes from one layer of a stack to the next: tensors, which travel, and the rest, which has to stay."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_eff.errors import UnsupportedCombinationError

__all__ = ["Carry", "Form", "run_layers"]


class Carry(NamedTuple):
    """Holds what enters a layer.

    Attributes:
        x: its first argument.
        args: further arguments, which every layer of a walked stack is given.
        kwargs: keyword arguments, which every layer of a walked stack is given.
    """

    x: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


class _Tensor:
    """Stands for a tensor in a form; all are equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tensor)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "tensor"


def _stand_in(leaf: Any) -> Any:
    """Return what stands for a leaf of a carry in its form."""
    return _Tensor() if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class Form:
    """Says how a carry is made of tensors: its structure, and everything in it that is not a tensor.

    Tensors travel between stages, the rest was seen once and has to stay the same.

    Attributes:
        template: a carry with stand-ins for its tensors.
    """

    template: tuple[Any, ...]

    @classmethod
    def of(cls, carry: Carry) -> Form:
        """Return the form of a carry."""
        return cls(pytree.tree_map(_stand_in, tuple(carry)))

    @functools.cached_property
    def is_one_tensor(self) -> bool:
        """Whether a carry of this form is one tensor and nothing else."""
        return self.template == (_Tensor(), (), {})

    def tensors(self, carry: Carry) -> list[Tensor]:
        """Return the tensors of a carry of this form.

        Raises:
            UnsupportedCombinationError: it has another form.
        """
        if isinstance(carry.x, Tensor) and not carry.args and not carry.kwargs and self.is_one_tensor:
            return [carry.x]
        given = Form.of(carry).template
        if given != self.template:
            raise UnsupportedCombinationError(
                f"What the stack of layers is called with has changed since the first batch, from {self.template} to "
                f"{given}. Between the stages of a pipeline tensors may change their shape, nothing else may change. "
                "Pass what changes as a tensor."
            )
        return [leaf for leaf in pytree.tree_leaves(tuple(carry)) if isinstance(leaf, Tensor)]

    def carry(self, tensors: Sequence[Tensor]) -> Carry:
        """Return the carry of this form with these tensors."""
        if self.is_one_tensor:
            return Carry(tensors[0])
        rest = iter(tensors)
        return Carry(*pytree.tree_map(lambda leaf: next(rest) if isinstance(leaf, _Tensor) else leaf, self.template))


def run_layers(layers: Sequence[nn.Module], carry: Carry) -> Carry:
    """Run layers one after the other, each with what the one before it returned."""
    x = carry.x
    for layer in layers:
        x = layer(x, *carry.args, **carry.kwargs)
    return carry._replace(x=x)
