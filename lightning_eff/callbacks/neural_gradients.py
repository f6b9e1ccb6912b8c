"""Hooks on the neural gradients of a model: dL/dz at the output z of every linear and convolution layer.

A hook on the output tensor sees the gradient before the layer's own backward, so what it returns enters both products
there (dx and dW). Unlike a full backward hook of the module it leaves the forward graph as it is: in-place activations
after the layer keep working.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from lightning_eff.checks import Names
from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError, nearest
from lightning_eff.integration.precision import check_strategy
from lightning_eff.methods import MethodInfo

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that have a neural gradient here; subclasses count."""
PATTERNS = Names("a list of patterns of layer names, ['layer?.*']")
OnGradient = Callable[[str, Tensor], "Tensor | None"]


def check_trainer(info: MethodInfo, trainer: Any) -> None:
    """Refuse a strategy or precision that ``info`` does not go with, before the first step.

    Raises:
        UnsupportedCombinationError: names what was found and why it is refused.
    """
    check_strategy(info, trainer.strategy)
    if trainer.precision in info.conflicts:
        raise UnsupportedCombinationError(
            f"{info.class_name} cannot be combined with precision={trainer.precision!r}: "
            f"{info.conflicts[trainer.precision]}."
        )


def select_layers(module: nn.Module, patterns: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Module]:
    """Return name -> layer of every linear and convolution layer whose name matches.

    Args:
        module: the model; the prefixes ``torch.compile`` puts into names are left out.
        patterns: shell patterns (``"encoder.*"``) of which a name must match one.
        exclude: patterns of which it must match none.

    Raises:
        ConfigurationError: a pattern matches no layer, or nothing is left.
    """
    named = ((name.replace("_orig_mod.", ""), layer) for name, layer in module.named_modules())
    found: dict[str, nn.Module] = {name: layer for name, layer in named if isinstance(layer, LAYERS)}
    for pattern in (*patterns, *exclude):
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ConfigurationError(
                f"The pattern {pattern!r} matches none of the {len(found)} linear and convolution layers."
                f"{nearest(pattern, found)} Their names: {', '.join(list(found)[:20]) or 'none'}."
            )
    chosen = {
        name: layer
        for name, layer in found.items()
        if any(fnmatchcase(name, p) for p in patterns) and not any(fnmatchcase(name, p) for p in exclude)
    }
    if not chosen:
        raise ConfigurationError(f"layers={list(patterns)!r} without exclude={list(exclude)!r} leaves no layer.")
    return chosen


class OutputGradients:
    """Calls ``on_gradient(name, gradient)`` for every output of the layers; a returned tensor takes its place."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def attach(self, layers: dict[str, nn.Module], on_gradient: OnGradient) -> None:
        """Begin; whatever was attached before is removed."""
        self.detach()
        for name, layer in layers.items():
            hook = functools.partial(_watch, functools.partial(on_gradient, name))
            self._handles.append(layer.register_forward_hook(hook))

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _watch(on_gradient: Callable[[Tensor], Tensor | None], _module: nn.Module, _args: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(on_gradient)


def console() -> Console:
    """A console as wide as the terminal, or 110 columns and more in a log file."""
    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, 110))
