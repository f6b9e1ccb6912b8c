"""What every quantised twin of a layer has in common: how it is made, when it steps aside, and what copies of it are.

A twin is reached by changing a module's class in place: ``type(layer)`` becomes a class (our mixin, the layer's own
class) with the layer's own name, so that code which looks at names, ``isinstance`` or ``repr`` finds what it knows.
Parameters, buffers, hooks and ``state_dict`` keys stay; giving the class back makes the layer plain again.

A twin is a substitute: a call it cannot quantise runs the plain layer's own forward, with torch's results and torch's
errors, and so does every call that takes the model out of the run (export, trace, script). Copies and pickles are of
the plain class.
"""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_eff.precision.layers.sharded import with_base
from lightning_eff.precision.layers.state import LayerState

STATE = "_eff_state"
"""Name of the attribute that holds a converted layer's state."""
PLAIN = "_eff_plain"
"""Name of the attribute of a twin's class that holds the class the module had."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that are quantised; float64 and complex layers would lose what they are used for."""
_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # from torch 2.7 on


class Twin(nn.Module):
    """Serves the mixins as a base; it adds nothing to a module but the attribute :data:`STATE`."""

    CALLED: ClassVar[tuple[str, ...]] = ("forward", "__call__")
    """Methods that a subclass of the plain layer must not have changed: the twin does something else instead."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the plain layer: a copy does not belong to the run."""
        kind = type(self)
        plain = with_base(kind, twin_in(kind), plain_class(kind))
        state = self.__getstate__()  # type: ignore[operator]  # a parametrised module refuses here, as it always does
        state = {key: value for key, value in state.items() if key != STATE}
        return copyreg._reconstructor, (plain, object, None), state  # type: ignore[attr-defined]


def twin_in(kind: type[Any]) -> type[Any]:
    """Return the class that :func:`twin_class` made, among ``kind`` and its ancestors."""
    return next(ancestor for ancestor in kind.__mro__ if PLAIN in ancestor.__dict__)


_MADE: dict[tuple[type[Twin], type[nn.Module]], type[nn.Module]] = {}


def twin_class(mixin: type[Twin], own: type[nn.Module]) -> type[nn.Module]:
    """Return the class (``mixin``, ``own``), under the name of ``own``; the same for equal arguments."""
    if (mixin, own) not in _MADE:
        taken = ("__module__", "__qualname__", "__doc__", "__annotations__")  # TorchScript reads the last
        body = {PLAIN: own, **{key: getattr(own, key, {}) for key in taken}}
        _MADE[mixin, own] = type(own.__name__, (mixin, own), body)
    return _MADE[mixin, own]


def plain_of(module: nn.Module) -> type[Any]:
    """Return the class whose forward is the plain layer's.

    Also of a module that has its class back: a wrapper around ``forward`` may hold a twin's bound method for longer
    than the run.
    """
    return plain_class(type(module))


def plain_class(kind: type[nn.Module]) -> type[Any]:
    """Return the class a module had before ``kind``, a twin's class; ``kind`` itself if it is none."""
    plain: type[Any] = getattr(kind, PLAIN, kind)
    return plain


def run_plain(module: nn.Module, *args: Any) -> Any:
    """Run the plain layer's own forward."""
    return plain_of(module).forward(module, *args)


def active_state(module: nn.Module, *inputs: object) -> LayerState | None:
    """Return the state of a converted module; None where the plain forward is to run, as for what is no tensor.

    Traced and exported programs are taken out of the run: they hold the plain layers.
    """
    if torch.jit.is_tracing() or _is_exporting() or not all(isinstance(x, Tensor) for x in inputs):
        return None
    return module.__dict__.get(STATE)


def takes(state: LayerState, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether the product of ``x`` and ``weight`` is quantised now; else the plain forward sees to it.

    Not quantised is what torch refuses (dtypes that do not go together), what is empty or has no numbers (meta
    tensors), and, named once in a warning, what there is no quantised form of.

    Nor is a frozen layer that no gradient passes: a teacher, a target network, features of a frozen backbone are what
    they are without the method, until the layer is unfrozen or a gradient passes it.
    """
    if torch.compiler.is_compiling():  # dtypes are all there is to look at
        return x.dtype in FLOATS and weight.dtype in FLOATS and state.is_on_path(x, weight)
    if x.numel() == 0 or weight.numel() == 0 or x.is_meta or weight.is_meta or not _is_own(x):
        return False
    if not torch.is_autocast_enabled(x.device.type):
        if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
            return False
    elif not (x.is_floating_point() and weight.is_floating_point()):
        return False
    if reason := unquantised(x, weight):
        state.say_once(reason)
        return False
    return state.is_on_path(x, weight)


def _is_own(x: Tensor) -> bool:
    """Return whether the data of ``x`` can be read; fake tensors and other wrappers have none of their own."""
    kind = type(x)
    return kind in (Tensor, nn.Parameter) or kind.__torch_function__ is not torch._C._disabled_torch_function_impl


def unquantised(x: Tensor, weight: Tensor) -> str:
    """Return why a product that torch computes has no quantised form; empty for what has one."""
    if x.dtype not in FLOATS or weight.dtype not in FLOATS:
        return f"it multiplies {x.dtype} by {weight.dtype}"
    if x.layout is not torch.strided or weight.layout is not torch.strided:
        return f"its input has the layout {x.layout}"
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._C._functorch.is_functorch_wrapped_tensor(weight):
        return "it is inside a transformation of torch.func"
    if forward_ad._current_level >= 0:
        return "it is differentiated in forward mode"
    return ""


class _Pretended:
    """Shows another value of an attribute while the module is converted; its own stays in the module's ``__dict__``."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __set_name__(self, owner: type[nn.Module], name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, kind: type[nn.Module] | None = None) -> object:
        return self.value

    def __set__(self, module: nn.Module, value: object) -> None:
        module.__dict__[self.name] = value


class EncoderLayerTwin(Twin):
    """Keeps ``nn.TransformerEncoderLayer`` from its fused inference path, which reads the weights themselves."""

    activation_relu_or_gelu = _Pretended(0)  # torch takes that path only for an activation it knows


class EncoderTwin(Twin):
    """Keeps ``nn.TransformerEncoder`` from making nested tensors, which only the fused path of its layers takes."""

    use_nested_tensor = _Pretended(False)


ENCODERS: dict[type[nn.Module], type[Twin]] = {
    nn.TransformerEncoderLayer: EncoderLayerTwin,
    nn.TransformerEncoder: EncoderTwin,
}
"""Containers that torch would run past their converted layers."""
