"""Which layers of a model are converted, and why the others are left alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_eff.errors import ConfigurationError
from lightning_eff.precision.formats.base import LayerOptions
from lightning_eff.precision.layers.sharded import is_dtensor, own_class, shape_of
from lightning_eff.precision.layers.table import SUPPORTED, twin_of
from lightning_eff.precision.layers.twins import FLOATS


@dataclass(frozen=True)
class Layer:
    """Holds a row of the conversion table; ``reason`` is empty for a converted layer, which may have a ``note``."""

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str = ""
    note: str = ""


def own_modules(model: nn.Module) -> set[int]:
    """Return the ids of the modules that lie in no metric; a metric's own networks only measure."""
    found: set[int] = set()
    pending = [model]
    while pending:
        module = pending.pop()
        if id(module) not in found and not isinstance(module, Metric):
            found.add(id(module))
            pending.extend(module.children())
    return found


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that own a matrix, outermost first, with the parts of attentions and parametrisations."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        parametrisations = getattr(module, "parametrizations", None)
        if isinstance(module, nn.MultiheadAttention) or isinstance(parametrisations, nn.ModuleDict):
            whole = parametrisations if isinstance(parametrisations, nn.ModuleDict) else module
            inside.update(id(part) for part in whole.modules())
            yield name, module
        elif twin_of(module) is not None or any(_is_matrix(p) for p in module.parameters(recurse=False)):
            yield name, module


def _is_matrix(parameter: nn.Parameter) -> bool:
    return is_lazy(parameter) or len(shape_of(parameter)) >= 2


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight; of an attention's projections together, () where there is none yet."""
    if isinstance(module, nn.MultiheadAttention):
        return (4 * module.embed_dim, module.embed_dim)
    weight = getattr(module, "weight", None)
    try:
        return () if weight is None else tuple(shape_of(weight))
    except RuntimeError:  # a lazy layer has no shape before its first batch
        return ()


def kind_of(module: nn.Module) -> str:
    """Return the name of a layer's type."""
    return own_class(type(module)).__name__


# --------------------------------------------------------------------------------------------------------- reasons


def _unsupported(module: nn.Module) -> str:
    """Return why ``module`` has no quantised twin."""
    own = own_class(type(module))
    kind, from_torch = own.__name__, own.__module__.startswith("torch.nn")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "a table, no product"
    base = next((b.__name__ for b in own.__mro__[1:] if b.__module__.startswith("torch.nn") and b is not nn.Module), "")
    if base and not from_torch:
        return f"{kind} is a subclass of {base} with a forward of its own"
    return f"{kind} has no low-precision form; supported are {SUPPORTED}"


def _not_now(module: nn.Module) -> str:
    """Return why this object is left alone although its type has a twin."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: run one batch before fit so that its shape is known"
    if hasattr(module, "parametrizations"):
        return "parametrised: its weight is computed, not stored"
    if "forward" in module.__dict__:
        return "its forward has been replaced on the object, which would go past the products"
    if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
        return "add_bias_kv and add_zero_attn have no low-precision form"
    return _weight_reason(module)


def _weight_reason(module: nn.Module) -> str:
    parameters = list(module.parameters())
    if not getattr(module, "_is_fsdp_managed_module", False) and any(is_dtensor(p) for p in parameters):
        return "its weight is a DTensor that fully_shard does not make whole (tensor parallelism)"
    dtype = next((p.dtype for p in parameters if p.dtype not in FLOATS), None)
    if dtype is not None:
        return f"its numbers are {str(dtype).removeprefix('torch.')}, which low precision would not stand for"
    return ""


def _exempt_by_pattern(name: str, options: LayerOptions) -> str:
    pattern = next((p for p in options.exempt if fnmatch.fnmatchcase(name, p)), None)
    return f"exempt: matches {pattern!r}" if pattern else ""


def check_patterns(options: LayerOptions, names: list[str]) -> None:
    """Refuse a pattern of ``options.exempt`` that matches none of the layers.

    Raises:
        ConfigurationError: there is one.
    """
    for pattern in options.exempt:
        if not fnmatch.filter(names, pattern):
            raise ConfigurationError(
                f"exempt pattern {pattern!r} matches no layer. Layers with weights: {', '.join(names[:20])}"
                f"{' ...' if len(names) > 20 else ''}."
            )


def why_left_alone(
    model: nn.Module, found: list[tuple[str, nn.Module]], options: LayerOptions, device: torch.device
) -> dict[str, str]:
    """Return layer name -> why it is left alone, empty if it is converted."""
    own = own_modules(model)
    reasons = {name: _reason(name, module, own, options, device) for name, module in found}
    if options.exempt_first_last:
        quantizable = [name for name, module in found if twin_of(module) and id(module) in own]
        starts_with_table = bool(found) and isinstance(found[0][1], nn.Embedding | nn.EmbeddingBag)
        for name, which in ((quantizable[:1] if not starts_with_table else [], "first"), (quantizable[-1:], "last")):
            for layer in name:
                reasons[layer] = reasons[layer] or f"exempt: the {which} layer (exempt_first_last=False converts it)"
    return reasons


def _reason(name: str, module: nn.Module, own: set[int], options: LayerOptions, device: torch.device) -> str:
    if id(module) not in own:
        return "inside a metric, which would report other numbers"
    if twin_of(module) is None:
        return _unsupported(module)
    return _not_now(module) or _exempt_by_pattern(name, options) or options.too_slow(weight_shape(module), device)
