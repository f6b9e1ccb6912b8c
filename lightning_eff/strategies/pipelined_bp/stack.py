"""The layers that a model may be cut between: where they are and what they are called.

A *stack* is a run of layers of which each is given what the one before it has returned: an ``nn.Sequential``, the
blocks of an ``nn.ModuleList`` that ``forward`` walks in order, or what a module's ``pipeline_stages()`` returns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_eff.errors import ConfigurationError, nearest

__all__ = ["OBVIOUS_SHARE", "Stack", "find_stack"]

OBVIOUS_SHARE = 0.8
"""A stack with this share of a model's parameters is taken without asking, whatever else there is."""


@dataclass(frozen=True)
class Stack:
    """Holds layers in the order in which a model runs them.

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
    """Return the layers of a plain nn.Sequential inside a stack, or the module itself if somebody hooked it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if type(module) is not nn.Sequential or any(hooks) or not _runs_its_children(module) or len(module) == 0:
        return [(name, module)]
    return [pair for key, child in _children(module) for pair in _flat(f"{name}.{key}", child)]


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return named children; one that stands in several places (an activation used again) in each of them."""
    return [(key, child) for key, child in module._modules.items() if child is not None]


def _runs_its_children(module: nn.Sequential) -> bool:
    """Return whether its layers one after the other are what it computes, as in no subclass or patch."""
    return type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def _stack(name: str, module: nn.Module) -> Stack:
    """Return the stack that a module holds."""
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
    """Return the stacks of a model that lie in no other."""
    if _is_stack(model):
        return [_stack(prefix, model)]
    return [
        found
        for key, child in model.named_children()
        for found in _outermost(child, f"{prefix}.{key}" if prefix else key)
    ]


def find_stack(model: nn.Module, module: str | None = None, *, stages: int = 1) -> Stack:
    """Return the stack to cut: the named one, or the obvious one.

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
    """Return the only stack that is long enough, or the one with nearly all of the parameters."""
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
