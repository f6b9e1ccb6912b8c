"""Turn a model's layers into their quantised twins, in place, and back; and say what was done to each and why.

The module tree belongs to the user and changes: layers come, go and are replaced while a run goes on.
:meth:`Conversion.update` looks at the tree again.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_eff.errors import ConfigurationError, InternalError
from lightning_eff.precision.formats.config import LayerConfig
from lightning_eff.precision.layers import compiled as operators  # noqa: F401 - registers what compiled graphs call
from lightning_eff.precision.layers.linear import mixin_of
from lightning_eff.precision.layers.relu import ReLUTwin
from lightning_eff.precision.layers.sharded import is_dtensor, own_class, shape_of, with_base
from lightning_eff.precision.layers.state import LayerState, RecentInputs
from lightning_eff.precision.layers.twins import ENCODERS, FLOATS, STATE, Twin, twin_class
from lightning_eff.runtime.seeds import SeedStream

_SUPPORTED = "Linear, Conv1d, Conv2d, Conv3d, MultiheadAttention, transformers' Conv1D"


@dataclass(frozen=True)
class Layer:
    """One row of the conversion table; ``reason`` is empty for a converted layer, which may have a ``note``."""

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class Change:
    """What :meth:`Conversion.update` found: the rows of layers that came, and of layers that went."""

    came: list[Layer] = field(default_factory=list)
    went: list[Layer] = field(default_factory=list)


def _own_modules(model: nn.Module) -> set[int]:
    """Ids of the modules that are reached without passing through a metric; a metric's own networks only measure."""
    found: set[int] = set()
    pending = [model]
    while pending:
        module = pending.pop()
        if id(module) not in found and not isinstance(module, Metric):
            found.add(id(module))
            pending.extend(module.children())
    return found


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
        elif mixin_of(module) is not None or any(_is_matrix(p) for p in module.parameters(recurse=False)):
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


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """What has a state of its own, by suffix: the two products of an attention read and write different tensors."""
    return {"": module, ".out_proj": module.out_proj} if isinstance(module, nn.MultiheadAttention) else {"": module}


def _kind(module: nn.Module) -> str:
    return own_class(type(module)).__name__


# --------------------------------------------------------------------------------------------------------- reasons


def _unsupported(module: nn.Module) -> str:
    """Why ``module`` has no quantised twin."""
    own = own_class(type(module))
    kind, from_torch = own.__name__, own.__module__.startswith("torch.nn")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "a table, no product"
    base = next((b.__name__ for b in own.__mro__[1:] if b.__module__.startswith("torch.nn") and b is not nn.Module), "")
    if base and not from_torch:
        return f"{kind} is a subclass of {base} with a forward of its own"
    return f"{kind} has no low-precision form; supported are {_SUPPORTED}"


def _not_now(module: nn.Module) -> str:
    """Why this object is left alone although its type has a twin."""
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


def _reasons(
    model: nn.Module, found: list[tuple[str, nn.Module]], config: LayerConfig, device: torch.device
) -> dict[str, str]:
    """Layer name -> why it is left alone, empty if it is converted."""
    own = _own_modules(model)
    reasons = {name: _reason(name, module, own, config, device) for name, module in found}
    if config.exempt_first_last:
        quantizable = [name for name, module in found if mixin_of(module) and id(module) in own]
        starts_with_table = bool(found) and isinstance(found[0][1], nn.Embedding | nn.EmbeddingBag)
        for name, which in ((quantizable[:1] if not starts_with_table else [], "first"), (quantizable[-1:], "last")):
            for layer in name:
                reasons[layer] = reasons[layer] or f"exempt: the {which} layer (exempt_first_last=False converts it)"
    return reasons


def _reason(name: str, module: nn.Module, own: set[int], config: LayerConfig, device: torch.device) -> str:
    if id(module) not in own:
        return "inside a metric, which would report other numbers"
    if mixin_of(module) is None:
        return _unsupported(module)
    return _not_now(module) or _exempt_by_pattern(name, config) or config.too_slow(_shape(module), device)


# ------------------------------------------------------------------------------------------------------ conversion


class Conversion:
    """The converted layers of one model in one run: the table, their states, the way back.

    Args:
        model: any module; a layer used in several places is converted once.
        config: options of the method.
        seeds: stream of rounding seeds.
        device: where the model will run.

    Attributes:
        rows: the table, in the order of the model.
        states: layer name -> state, of every converted layer.
    """

    def __init__(self, model: nn.Module, config: LayerConfig, seeds: SeedStream, device: torch.device) -> None:
        self.model, self.config, self.seeds, self.device = model, config, seeds, device
        self.rows: list[Layer] = []
        self.states: dict[str, LayerState] = {}
        self._recent = RecentInputs()
        self._seen: list[nn.Module] = []
        self._rows_of: dict[int, Layer] = {}
        self._given: dict[int, tuple[nn.Module, type[nn.Module], type[nn.Module]]] = {}

    @property
    def layers(self) -> int:
        """Number of converted layers."""
        return sum(not row.reason for row in self.rows)

    def update(self) -> Change:
        """Look at the module tree: convert what has come, give back what has gone. Cheap where nothing has changed."""
        now = list(self.model.modules())
        if now == self._seen:
            return Change()
        self._seen = now  # keeps every module alive, so that an id stands for one
        present = {id(module) for module in now}
        went = [self._rows_of.pop(key) for key in set(self._rows_of) - present]
        for key in set(self._given) - present:
            self._give_back(key)
        came = self._convert()
        self._swap_others(now)
        return Change(came, went)

    def _convert(self) -> list[Layer]:
        found = list(_candidates(self.model))
        if not self.rows:
            _check_patterns(self.config, [name for name, _ in found])
        reasons, came = _reasons(self.model, found, self.config, self.device), []
        for name, module in found:
            row = self._rows_of.get(id(module))
            if row is None:
                frozen = not any(p.requires_grad for p in module.parameters())
                note = "" if reasons[name] or not frozen else "frozen: plain until a gradient passes"
                row = Layer(name, _kind(module), _shape(module), reasons[name], note)
                came.append(row)
                if not row.reason:
                    self._convert_layer(module, on_path=not frozen)
            self._rows_of[id(module)] = replace(row, name=name)  # another that was inserted before it moves it
        self.rows = [self._rows_of[id(module)] for _, module in found]
        self.states = dict(self._named_states(found))
        return came

    def _convert_layer(self, module: nn.Module, *, on_path: bool) -> None:
        mixin = mixin_of(module)
        for part in _parts(module).values():
            state = part.__dict__[STATE] = LayerState("", self.config, self.seeds, self._recent)
            state.on_path = on_path
            self._swap(
                part, mixin if part is module else Twin
            )  # the latter so that copies of it leave the state behind

    def _named_states(self, found: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, LayerState]]:
        """The states of the layers as the tree is now, under the names they have now."""
        for name, module in found:
            for suffix, part in _parts(module).items():
                state: LayerState | None = part.__dict__.get(STATE)
                if state is not None:  # a copy of a parametrised layer keeps the name, and nothing under it
                    state.name = f"{name}{suffix}".lstrip(".")
                    yield state.name, state

    def _swap_others(self, modules: list[nn.Module]) -> None:
        """Pack ReLUs; keep torch from the fused inference paths of encoders, which read the weights themselves."""
        if not self.states:
            return
        own = _own_modules(self.model)
        for module in modules:
            if id(module) in self._given or id(module) not in own:
                continue
            if isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward and self.config.pack_relu:
                self._swap(module, ReLUTwin)
            encoder = next((mixin for kind, mixin in ENCODERS.items() if isinstance(module, kind)), None)
            if encoder is not None and any(part.__dict__.get(STATE) is not None for part in module.modules()):
                self._swap(module, encoder)

    def _swap(self, module: nn.Module, mixin: type[Twin] | None) -> None:
        if mixin is None:  # _reasons gives every layer without a twin a reason
            raise InternalError(f"internal error: {type(module).__name__} has no twin")
        found = own_class(type(module))
        own = getattr(found, "_eff_plain", found)  # a user's type(layer)(...) makes a twin without a state
        twin = twin_class(mixin, own)
        self._given[id(module)] = module, twin, own
        module.__class__ = with_base(type(module), found, twin)

    def _give_back(self, key: int) -> None:
        module, twin, own = self._given.pop(key)
        module.__class__ = with_base(type(module), twin, own)
        for part in _parts(module).values():
            part.__dict__.pop(STATE, None)

    def undo(self) -> None:
        """Give every module its class back; harmless when called twice."""
        for key in list(self._given):
            self._give_back(key)
        self._seen, self._rows_of = [], {}

    def saved_bytes(self) -> tuple[int, int]:
        """Bytes the converted layers kept for backward in their last forward, and what float32 would have kept."""
        states = self.states.values()
        return sum(s.saved_bytes for s in states), sum(s.saved_bytes_fp32 for s in states)


def convert(
    model: nn.Module, config: LayerConfig, seeds: SeedStream | None = None, device: torch.device | None = None
) -> Conversion:
    """Convert ``model`` in place.

    Layers are left in high precision when their name matches ``config.exempt``, when they are the first or the last
    (an embedding in front counts as the first), when their type has no quantised twin, when they belong to a metric, or
    when the method says that they would get slower; each with its reason in ``Conversion.rows``.

    Args:
        model: any module; a layer used in several places is converted once.
        config: options of the method.
        seeds: stream of rounding seeds; default: a new one.
        device: where the model will run; default: where its parameters are.

    Raises:
        ConfigurationError: a pattern in ``config.exempt`` matches no layer.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if device is None else device
    conversion = Conversion(model, config, SeedStream() if seeds is None else seeds, device)
    conversion.update()
    return conversion
