"""Turn a model's layers into their quantised twins, in place, and back; and say what was done to each and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_eff.errors import ConfigurationError
from lightning_eff.precision import operators  # noqa: F401 - registers what compiled graphs call
from lightning_eff.precision.config import LayerConfig
from lightning_eff.precision.layers import STATE, twin_of
from lightning_eff.precision.relu import PackedReLU
from lightning_eff.precision.sharded import is_dtensor, own_class, put_in, shape_of
from lightning_eff.precision.state import LayerState, RecentInputs, SeedStream

_SUPPORTED = "Linear, Conv1d, Conv2d, Conv3d, MultiheadAttention, transformers' Conv1D"
_FAST_PATH = "activation_relu_or_gelu"


@dataclass(frozen=True)
class Layer:
    """One row of the conversion table; ``reason`` is empty for a converted layer."""

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str = ""


@dataclass
class Conversion:
    """What :func:`convert` did: the table, the converted layers' states and weights, other parameters, the way back."""

    rows: list[Layer] = field(default_factory=list)
    states: dict[str, LayerState] = field(default_factory=dict)
    weights: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    others: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    modules: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    _encoders: list[tuple[nn.Module, int]] = field(default_factory=list)

    @property
    def layers(self) -> int:
        """Number of converted layers."""
        return sum(not row.reason for row in self.rows)

    def undo(self) -> None:
        """Give every module its class back; harmless when called twice."""
        for module, kind in self.modules:
            module.__class__ = put_in(type(module), own_class(kind))
            module.__dict__.pop(STATE, None)
        for module, activation in self._encoders:
            setattr(module, _FAST_PATH, activation)
        self.modules, self._encoders = [], []

    def saved_bytes(self) -> tuple[int, int]:
        """Bytes the converted layers kept for backward in their last forward, and what float32 would have kept."""
        states = self.states.values()
        return sum(s.saved_bytes for s in states), sum(s.saved_bytes_fp32 for s in states)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that own a matrix, outermost first; parts of a MultiheadAttention, and parametrisations, belong to it."""
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


def _shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.MultiheadAttention):
        return (4 * module.embed_dim, module.embed_dim)
    weight = getattr(module, "weight", None)
    try:
        return () if weight is None else tuple(shape_of(weight))
    except RuntimeError:  # a lazy layer has no shape before its first batch
        return ()


def _unsupported(module: nn.Module) -> str:
    """Why ``module`` has no quantised twin."""
    own = own_class(type(module))
    kind, from_torch = own.__name__, own.__module__.startswith("torch.nn")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "a table, no product"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: run one batch before fit so that its shape is known"
    if hasattr(module, "parametrizations"):
        return "parametrised: its weight is computed, not stored"
    base = next((b.__name__ for b in own.__mro__[1:] if b.__module__.startswith("torch.nn") and b is not nn.Module), "")
    if base and not from_torch:
        return f"{kind} is a subclass of {base} and may have a forward of its own"
    return f"{kind} has no low-precision form; supported are {_SUPPORTED}"


def _attention_reason(module: nn.Module) -> str:
    extra = isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn)
    return "add_bias_kv and add_zero_attn have no low-precision form" if extra else ""


def _split_reason(module: nn.Module) -> str:
    whole = getattr(module, "_is_fsdp_managed_module", False) or not any(is_dtensor(p) for p in module.parameters())
    return "" if whole else "its weight is a DTensor that fully_shard does not make whole (tensor parallelism)"


def _exempt_by_pattern(name: str, config: LayerConfig) -> str:
    pattern = next((p for p in config.exempt if fnmatch.fnmatchcase(name, p)), None)
    return f"exempt: matches {pattern!r}" if pattern else ""


def _check_patterns(config: LayerConfig, names: list[str]) -> None:
    for pattern in config.exempt:
        if not fnmatch.filter(names, pattern):
            raise ConfigurationError(
                f"exempt pattern {pattern!r} matches no layer. Layers with weights: {', '.join(names[:20])}"
                f"{' ...' if len(names) > 20 else ''}."
            )


def _reasons(found: list[tuple[str, nn.Module]], config: LayerConfig, device: torch.device) -> dict[str, str]:
    """Layer name -> why it is left alone, empty if it is converted."""
    reasons = {
        name: _attention_reason(module)
        or _split_reason(module)
        or _exempt_by_pattern(name, config)
        or config.too_slow(_shape(module), device)
        if twin_of(module)
        else _unsupported(module)
        for name, module in found
    }
    if config.exempt_first_last:
        quantizable = [name for name, module in found if twin_of(module)]
        starts_with_table = bool(found) and isinstance(found[0][1], nn.Embedding | nn.EmbeddingBag)
        for name, which in ((quantizable[:1] if not starts_with_table else [], "first"), (quantizable[-1:], "last")):
            for layer in name:
                reasons[layer] = reasons[layer] or f"exempt: the {which} layer (exempt_first_last=False converts it)"
    return reasons


def convert(
    model: nn.Module, config: LayerConfig, seeds: SeedStream | None = None, device: torch.device | None = None
) -> Conversion:
    """Convert ``model`` in place.

    Layers are left in high precision when their name matches ``config.exempt``, when they are the first or the last
    (an embedding in front counts as the first), when their type has no quantised twin, or when the method says that
    they would get slower; each with its reason in ``Conversion.rows``.

    Args:
        model: any module; a layer used in several places is converted once.
        config: options of the method.
        seeds: stream of rounding seeds; default: a new one.
        device: where the model will run; default: where its parameters are.

    Raises:
        ConfigurationError: a pattern in ``config.exempt`` matches no layer.
    """
    seeds, recent = SeedStream() if seeds is None else seeds, RecentInputs()
    result, found = Conversion(), list(_candidates(model))
    _check_patterns(config, [name for name, _ in found])
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if device is None else device
    for name, reason in _reasons(found, config, device).items():
        module = model.get_submodule(name)
        result.rows.append(Layer(name, own_class(type(module)).__name__, _shape(module), reason))
        if not reason:
            _swap(module, LayerState(name, config, seeds, recent), result)
            if isinstance(module, nn.MultiheadAttention):  # its two products read and write different tensors
                _give_state(module.out_proj, LayerState(f"{name}.out_proj".lstrip("."), config, seeds, recent), result)
    known = {id(weight) for _, weight in result.weights}
    result.others = [(name, p) for name, p in model.named_parameters() if id(p) not in known]
    for module in model.modules():
        if config.pack_relu and type(module) is nn.ReLU and result.states:
            result.modules.append((module, nn.ReLU))
            module.__class__ = PackedReLU
        # The fused inference path of TransformerEncoderLayer reads raw weights; this value makes torch refuse it.
        if isinstance(module, nn.TransformerEncoderLayer) and getattr(module, _FAST_PATH, False):
            result._encoders.append((module, getattr(module, _FAST_PATH)))
            setattr(module, _FAST_PATH, 0)
    return result


def _swap(module: nn.Module, state: LayerState, result: Conversion) -> None:
    twin, name = twin_of(module), state.name
    if twin is None:  # _reasons gives every layer without a twin a reason
        raise RuntimeError(f"internal error: {name} has no twin")
    kind = type(module)
    result.weights += [(f"{name}.{key}", p) for key, p in module.named_parameters() if len(shape_of(p)) >= 2]
    _give_state(module, state, result)
    module.__class__ = put_in(kind, _with_base(twin, own_class(kind)))


def _give_state(module: nn.Module, state: LayerState, result: Conversion) -> None:
    result.modules.append((module, type(module)))
    result.states[state.name] = state
    module.__dict__[STATE] = state


_JOINED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _with_base(twin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """A twin that is not derived from the plain class (a third party's) becomes so."""
    if issubclass(twin, kind) or twin.__mro__[1] is not nn.Module:
        return twin
    if (twin, kind) not in _JOINED:
        _JOINED[twin, kind] = type(twin.__name__, (twin, kind), {"__module__": twin.__module__})
    return _JOINED[twin, kind]
