"""Turn a model's layers into their quantised twins, in place, and back; and say what was done to each and why.

The module tree belongs to the user and changes: layers come, go and are replaced while a run goes on.
:meth:`Conversion.update` looks at the tree again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lightning_eff.errors import InternalError
from lightning_eff.precision.formats.base import LayerOptions
from lightning_eff.precision.layers import compiled as operators  # noqa: F401 - registers what compiled graphs call
from lightning_eff.precision.layers.relu import ReLUTwin
from lightning_eff.precision.layers.selection import (
    Layer,
    candidates,
    check_patterns,
    kind_of,
    own_modules,
    weight_shape,
    why_left_alone,
)
from lightning_eff.precision.layers.sharded import own_class, with_base
from lightning_eff.precision.layers.state import LayerState, RecentInputs
from lightning_eff.precision.layers.table import twin_of
from lightning_eff.precision.layers.twins import ENCODERS, STATE, Twin, plain_class, twin_class
from lightning_eff.runtime.seeds import SeedStream


@dataclass(frozen=True)
class Change:
    """Holds what :meth:`Conversion.update` found: the rows of layers that came, and of layers that went."""

    came: list[Layer] = field(default_factory=list)
    went: list[Layer] = field(default_factory=list)


class Conversion:
    """Holds the converted layers of one model in one run: the table, their states, the way back.

    Args:
        model: any module; a layer used in several places is converted once.
        options: of the method.
        seeds: stream of rounding seeds.
        device: where the model will run.

    Attributes:
        rows: the table, in the order of the model.
        states: layer name -> state, of every converted layer.
    """

    def __init__(self, model: nn.Module, options: LayerOptions, seeds: SeedStream, device: torch.device) -> None:
        self.model = model
        self.options = options
        self.seeds = seeds
        self.device = device
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
        found = list(candidates(self.model))
        if not self.rows:
            check_patterns(self.options, [name for name, _ in found])
        reasons, came = why_left_alone(self.model, found, self.options, self.device), []
        for name, module in found:
            row = self._rows_of.get(id(module))
            if row is None:
                frozen = not any(p.requires_grad for p in module.parameters())
                note = "" if reasons[name] or not frozen else "frozen: plain until a gradient passes"
                row = Layer(name, kind_of(module), weight_shape(module), reasons[name], note)
                came.append(row)
                if not row.reason:
                    self._convert_layer(module, on_path=not frozen)
            self._rows_of[id(module)] = replace(row, name=name)  # another that was inserted before it moves it
        self.rows = [self._rows_of[id(module)] for _, module in found]
        self.states = dict(self._named_states(found))
        return came

    def _convert_layer(self, module: nn.Module, *, on_path: bool) -> None:
        mixin = twin_of(module)
        for part in _parts(module).values():
            state = part.__dict__[STATE] = LayerState("", self.options, self.seeds, self._recent)
            state.on_path = on_path
            self._swap(
                part, mixin if part is module else Twin
            )  # the latter so that copies of it leave the state behind

    def _named_states(self, found: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, LayerState]]:
        """Yield the states of the layers as the tree is now, under the names they have now."""
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
        own = own_modules(self.model)
        for module in modules:
            if id(module) in self._given or id(module) not in own:
                continue
            if isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward and self.options.pack_relu:
                self._swap(module, ReLUTwin)
            encoder = next((mixin for kind, mixin in ENCODERS.items() if isinstance(module, kind)), None)
            if encoder is not None and any(part.__dict__.get(STATE) is not None for part in module.modules()):
                self._swap(module, encoder)

    def _swap(self, module: nn.Module, mixin: type[Twin] | None) -> None:
        if mixin is None:  # why_left_alone() gives every layer without a twin a reason
            raise InternalError(f"internal error: {type(module).__name__} has no twin")
        found = own_class(type(module))
        own = plain_class(found)  # a user's type(layer)(...) makes a twin without a state
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
        """Return the bytes converted layers kept for backward in their last forward, and float32 would have kept."""
        states = self.states.values()
        return sum(s.saved_bytes for s in states), sum(s.saved_bytes_fp32 for s in states)


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """Return what has a state of its own, by suffix: an attention's two products read and write other tensors."""
    return {"": module, ".out_proj": module.out_proj} if isinstance(module, nn.MultiheadAttention) else {"": module}


def convert(
    model: nn.Module, options: LayerOptions, seeds: SeedStream | None = None, device: torch.device | None = None
) -> Conversion:
    """Convert ``model`` in place.

    Layers are left in high precision when their name matches ``options.exempt``, when they are the first or the last
    (an embedding in front counts as the first), when their type has no quantised twin, when they belong to a metric, or
    when the method says that they would get slower; each with its reason in ``Conversion.rows``.

    Args:
        model: any module; a layer used in several places is converted once.
        options: of the method.
        seeds: stream of rounding seeds; default: a new one.
        device: where the model will run; default: where its parameters are.

    Raises:
        ConfigurationError: a pattern in ``options.exempt`` matches no layer.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if device is None else device
    conversion = Conversion(model, options, SeedStream() if seeds is None else seeds, device)
    conversion.update()
    return conversion
