"""The layers a model may be cut between: where they are, how they are called, what passes from one to the next.

A *stack* is a run of layers of which each is given what the one before it has returned: an ``nn.Sequential``, the
blocks of an ``nn.ModuleList`` that ``forward`` walks in order, or what a module's ``pipeline_stages()`` returns. During
a training step an :class:`Entry` stands in front of it: where the user's code enters the stack it hands over what it
brought, the *carry*, and takes up again where the stack ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError, nearest

OBVIOUS_SHARE = 0.8
"""A stack with this share of a model's parameters is taken without asking, whatever else there is."""


class Captured(BaseException):
    """Ends the user's ``training_step`` on the first stage, once the stack's input is there."""


@dataclass(frozen=True)
class Stack:
    """Layers in the order in which a model runs them.

    Attributes:
        name: qualified name of the module that holds them; empty for the model itself.
        owner: that module.
        names: qualified names of the layers.
        layers: the layers.
        walked: whether ``forward`` calls one layer after the other itself (``nn.ModuleList``).
    """

    name: str
    owner: nn.Module
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    walked: bool

    def __len__(self) -> int:
        return len(self.layers)


def _flat(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """A plain nn.Sequential inside a stack is as good as its layers, unless somebody hooked it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if type(module) is not nn.Sequential or any(hooks) or not _runs_its_children(module) or len(module) == 0:
        return [(name, module)]
    return [pair for key, child in _children(module) for pair in _flat(f"{name}.{key}", child)]


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named children; one that stands in several places (an activation that is used again) in each of them."""
    return [(key, child) for key, child in module._modules.items() if child is not None]


def _runs_its_children(module: nn.Sequential) -> bool:
    """Whether the layers one after the other are what it computes: a subclass or a patch may do something else."""
    return type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def _stack(name: str, module: nn.Module) -> Stack:
    prefix = f"{name}." if name else ""
    if callable(stages := getattr(module, "pipeline_stages", None)):
        found = {id(m): n for n, m in module.named_modules()}
        layers = list(stages())
        if not all(isinstance(layer, nn.Module) and id(layer) in found for layer in layers):
            raise ConfigurationError(
                f"{name or 'The model'}.pipeline_stages() has to return modules that are registered in it, in the "
                f"order in which they run; it returned {[type(layer).__name__ for layer in layers]}."
            )
        pairs = [(prefix + found[id(layer)], layer) for layer in layers]
        return Stack(name, module, tuple(n for n, _ in pairs), tuple(m for _, m in pairs), walked=False)
    walked = isinstance(module, nn.ModuleList)
    pairs = []
    for key, child in _children(module):
        pairs += [(prefix + key, child)] if walked else _flat(prefix + key, child)
    return Stack(name, module, tuple(n for n, _ in pairs), tuple(m for _, m in pairs), walked)


def _is_stack(module: nn.Module) -> bool:
    if callable(getattr(module, "pipeline_stages", None)):
        return True
    return _runs_its_children(module) if isinstance(module, nn.Sequential) else isinstance(module, nn.ModuleList)


def _outermost(model: nn.Module, prefix: str = "") -> list[Stack]:
    if _is_stack(model):
        return [_stack(prefix, model)]
    return [
        found
        for key, child in model.named_children()
        for found in _outermost(child, f"{prefix}.{key}" if prefix else key)
    ]


def find_stack(model: nn.Module, module: str | None = None, *, stages: int = 1) -> Stack:
    """The stack to cut: the named one, or the obvious one.

    Args:
        model: the whole model.
        module: qualified name of the module that holds the layers; None looks for the one stack with enough layers, or
            the one with at least :data:`OBVIOUS_SHARE` of the parameters.
        stages: how many stages it is to be cut into.

    Raises:
        ConfigurationError: there is none, or more than one and none of them obvious, or it has too few layers.
    """
    if module is not None:
        names = [name for name, m in model.named_modules() if _is_stack(m)]
        try:
            owner = model.get_submodule(module)
        except AttributeError as error:
            raise ConfigurationError(
                f"module={module!r} is not a module of this model.{nearest(module, names)} Stacks of layers in it: "
                f"{', '.join(names) or 'none'}."
            ) from error
        if not _is_stack(owner):
            raise ConfigurationError(
                f"module={module!r} is a {type(owner).__name__}; it has to be an nn.Sequential without a forward of "
                "its own, an nn.ModuleList whose blocks are called in order, or a module with a method "
                "pipeline_stages() that returns its layers in the order in which they run. Stacks in this model: "
                f"{', '.join(names) or 'none'}."
            )
        chosen = _stack(module, owner)
    else:
        chosen = _obvious(model, stages)
    if len(chosen) < stages:
        raise ConfigurationError(
            f"The stack {chosen.name or 'of the model'!r} has {len(chosen)} layers ({', '.join(chosen.names)}) and "
            f"cannot be cut into {stages} stages. Use fewer stages, or name another with module=..."
        )
    return chosen


def _obvious(model: nn.Module, stages: int) -> Stack:
    everything = max(sum(p.numel() for p in model.parameters()), 1)
    sizes = [(sum(p.numel() for p in s.owner.parameters()) / everything, s) for s in _outermost(model)]
    enough = [(share, stack) for share, stack in sizes if len(stack) >= max(stages, 2)]
    large = [stack for share, stack in enough if share >= OBVIOUS_SHARE]
    found = large or [stack for _, stack in enough]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(f"{stack.name} ({len(stack)} layers, {share:.0%} of the parameters)" for share, stack in sizes)
    raise ConfigurationError(
        f"pipelined_bp finds no single stack of layers to cut into {stages} stages: {listing or 'none at all'}. Name "
        "one, PipelinedBPStrategy(module='net.blocks'), or give the module that runs the layers one after the other a "
        "method pipeline_stages() that returns them in that order."
    )


# ------------------------------------------------------------------------------------------------------- the carry


class Carry(NamedTuple):
    """What enters a layer: its first argument, and what every layer of a walked stack is given besides."""

    x: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


class _Tensor:
    """Stands for a tensor in a form."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tensor)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "tensor"


def _forms(t: Any) -> Any:
    return _Tensor() if isinstance(t, Tensor) else t


@dataclass(frozen=True)
class Form:
    """How a carry is made of tensors: its structure, and everything in it that is not a tensor.

    Tensors travel between stages, the rest was seen once and has to stay the same.

    Attributes:
        template: a carry with stand-ins for its tensors.
    """

    template: tuple[Any, ...]

    @classmethod
    def of(cls, carry: Carry) -> Form:
        """The form of a carry."""
        return cls(pytree.tree_map(_forms, tuple(carry)))

    @functools.cached_property
    def is_one_tensor(self) -> bool:
        """Whether a carry of this form is one tensor and nothing else."""
        return self.template == (_Tensor(), (), {})

    def tensors(self, carry: Carry) -> list[Tensor]:
        """The tensors of a carry of this form.

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
        """The carry of this form with these tensors."""
        if self.is_one_tensor:
            return Carry(tensors[0])
        rest = iter(tensors)
        return Carry(*pytree.tree_map(lambda leaf: next(rest) if isinstance(leaf, _Tensor) else leaf, self.template))


def run(layers: Sequence[nn.Module], carry: Carry) -> Carry:
    """Run layers one after the other."""
    x = carry.x
    for layer in layers:
        x = layer(x, *carry.args, **carry.kwargs)
    return carry._replace(x=x)


# ------------------------------------------------------------------------------------------------------- the entry


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
        """The layer has been run already; the user's walk has to be the one that was run."""

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
    (values, form), (others, other_form) = pytree.tree_flatten(given), pytree.tree_flatten(first)

    def equal(a: Any, b: Any) -> bool:
        tensors = isinstance(a, Tensor), isinstance(b, Tensor)
        return a is b or (torch.equal(a, b) if all(tensors) else not any(tensors) and bool(a == b))

    return bool(form == other_form) and all(map(equal, values, others))
