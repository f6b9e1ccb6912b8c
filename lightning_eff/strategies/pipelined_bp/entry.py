"""Where the user's ``training_step`` enters a stack of layers: it hands over its input and takes up the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.strategies.pipelined_bp.carry import Carry
from lightning_eff.strategies.pipelined_bp.stack import Stack

__all__ = ["Captured", "Entry"]


class Captured(BaseException):
    """Ends the user's ``training_step`` on the first stage, once the stack's input is there."""


class Entry:
    """Stands in front of a stack while the user's ``training_step`` runs.

    Args:
        stack: the layers.
        inside: is given the carry where the user's code enters the stack, and returns what the stack is to return; or
            raises :class:`Captured`.
    """

    def __init__(self, stack: Stack, inside: Callable[[Carry], Any]) -> None:
        self.stack, self._inside = stack, inside
        self.entered = False
        self._before: dict[nn.Module, Any] = {}
        self._to_come: list[nn.Module] = []

    def __enter__(self) -> Entry:
        self._put(self._targets()[0], self._called)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._take_away()
        if kind is None and self._to_come:
            self._refuse_walk(f"does not call {len(self._to_come)} of them")

    def _targets(self) -> tuple[nn.Module, ...]:
        return self.stack.layers if self.stack.walked else (self.stack.owner,)

    def _put(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        # An attribute of the instance goes before the method of its class; hooks, names and parameters stay.
        self._before.setdefault(module, module.__dict__.get("forward"))
        module.__dict__["forward"] = forward

    def _take_away(self) -> None:
        for module, forward in self._before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
        self._before = {}

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        if self.entered:
            raise UnsupportedCombinationError(
                f"training_step runs the layers of {self.stack.name or 'the model'!r} more than once; a pipeline stage "
                "sees every micro-batch once. Concatenate what goes through them, or use strategy='ddp'."
            )
        if not args or ((kwargs or len(args) > 1) and not self.stack.walked):
            raise UnsupportedCombinationError(
                f"{self.stack.name or 'The model'} is called with {len(args)} arguments and the keywords "
                f"{sorted(kwargs)}; a stack that is cut takes one positional argument, which may be a tuple."
            )
        self.entered = True
        self._take_away()
        carry = Carry(args[0], args[1:], kwargs)
        out = self._inside(carry)
        self._to_come = list(self._targets()[1:])
        self._put(self._targets()[0], self._called)  # a second time is one too many
        for layer in self._to_come:
            self._put(layer, self._passing(layer, carry._replace(x=out)))
        return out

    def _passing(self, layer: nn.Module, carry: Carry) -> Callable[..., Any]:
        """Return what stands for a layer that has been run; the user's walk has to be the one that was run."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._to_come or self._to_come.pop(0) is not layer:
                self._refuse_walk("calls them in another order or one of them again")
            if not args or args[0] is not carry.x:
                self._refuse_walk("changes what goes from one to the next")
            if not _same((args[1:], kwargs), (carry.args, carry.kwargs)):
                self._refuse_walk("gives them different further arguments")
            return carry.x

        return forward

    def _refuse_walk(self, what: str) -> None:
        raise UnsupportedCombinationError(
            f"training_step walks the layers of {self.stack.name!r} and {what}; a pipeline runs each once, one after "
            "the other, all with the same further arguments. Move that code into the layers."
        )


def _same(given: Any, first: Any) -> bool:
    """Return whether two trees have the same structure and equal leaves."""
    (values, form), (others, other_form) = pytree.tree_flatten(given), pytree.tree_flatten(first)

    def equal(a: Any, b: Any) -> bool:
        tensors = isinstance(a, Tensor), isinstance(b, Tensor)
        return a is b or (torch.equal(a, b) if all(tensors) else not any(tensors) and bool(a == b))

    return bool(form == other_form) and all(map(equal, values, others))
