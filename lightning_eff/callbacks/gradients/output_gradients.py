"""Hooks on the neural gradients of a model: dL/dz at the output z of every linear and convolution layer.

A hook on the output tensor sees the gradient before the layer's own backward, so what it returns enters both products
there (dx and dW). Unlike a full backward hook of the module it leaves the forward graph as it is: in-place activations
after the layer keep working.

The hooks are there while a batch is trained; copies of a model, whenever they are made, are not watched.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_eff.callbacks.one_run import OneRunMixin
from lightning_eff.checks import Names
from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError, nearest
from lightning_eff.integration.graft import check_strategy
from lightning_eff.methods import MethodInfo
from lightning_eff.runtime.figures import of_method

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


def select_layers(
    module: nn.Module, patterns: Sequence[str], exclude: Sequence[str], *, strict: bool = True
) -> dict[str, nn.Module]:
    """Return name -> layer of every linear and convolution layer whose name matches.

    Args:
        module: the model; the prefixes ``torch.compile`` puts into names are left out.
        patterns: shell patterns (``"encoder.*"``) of which a name must match one.
        exclude: patterns of which it must match none.
        strict: patterns must match; at the start of a run. Layers that are removed later are no mistake.

    Raises:
        ConfigurationError: a pattern matches no layer, or nothing is left.
    """
    named = ((name.replace("_orig_mod.", ""), layer) for name, layer in module.named_modules())
    found: dict[str, nn.Module] = {name: layer for name, layer in named if isinstance(layer, LAYERS)}
    for pattern in (*patterns, *exclude) if strict else ():
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
    if strict and not chosen:
        raise ConfigurationError(f"layers={list(patterns)!r} without exclude={list(exclude)!r} leaves no layer.")
    return chosen


class OutputGradients:
    """Calls ``on_gradient(name, gradient)`` for every output of the layers; a returned tensor takes its place.

    A copy, or what is read from a file, watches nothing.

    Args:
        first: go before all other hooks of a layer; those that only look see what the first ones return.
    """

    def __init__(self, *, first: bool = False) -> None:
        self._first = first
        self._handles: list[RemovableHandle] = []
        self._layers: dict[str, weakref.ref[nn.Module]] = {}

    def __reduce__(self) -> tuple[Callable[[], OutputGradients], tuple[()]]:
        return functools.partial(OutputGradients, first=self._first), ()

    @property
    def names(self) -> set[str]:
        """Names of the layers that were attached last."""
        return set(self._layers)

    def attach(self, layers: dict[str, nn.Module], on_gradient: OnGradient) -> list[str]:
        """Watch these layers and no others; return the names that stood for other layers before."""
        self.detach()
        for name, layer in layers.items():
            hook = _Hook(functools.partial(on_gradient, name))
            self._handles.append(layer.register_forward_hook(hook, prepend=self._first))
        changed = [name for name, ref in self._layers.items() if name in layers and ref() is not layers[name]]
        self._layers = {name: weakref.ref(layer) for name, layer in layers.items()}
        return changed

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class OutputGradientsMixin(OneRunMixin):
    """Watches the gradients at layers' outputs in a callback, and lets go of them when a run breaks off.

    Args:
        first: see :class:`OutputGradients`.
    """

    info: ClassVar[MethodInfo]

    def __init__(self, *, first: bool = False) -> None:
        super().__init__()
        self._hooks = OutputGradients(first=first)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what has not been shown to work."""
        check_trainer(self.info, trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off."""
        self._hooks.detach()
        super().on_exception(trainer, pl_module, exception)

    def _log(self, pl_module: Any, figures: dict[str, Any]) -> None:
        """Log figures of the method as the user's own."""
        pl_module.log_dict(of_method(self.info.name, figures))


class _Hook:
    """Watches the outputs of one layer; in a copy of the layer it does nothing, and holds nothing of this run."""

    def __init__(self, on_gradient: Callable[[Tensor], Tensor | None]) -> None:
        self.on_gradient = on_gradient

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self.on_gradient)

    def __reduce__(self) -> tuple[type[_Hook], tuple[Callable[[Tensor], None]]]:
        return _Hook, (_let_pass,)


def _let_pass(grad: Tensor) -> None:
    """Leave a gradient as it is."""
