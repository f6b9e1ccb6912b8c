"""The models a precision plugin has converted: one in a Trainer, maybe several with Fabric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_eff.integration.attached import trainer_of
from lightning_eff.precision.gradients import Named
from lightning_eff.precision.layers.convert import Change, Conversion
from lightning_eff.precision.layers.state import LayerState


class ConvertedModels:
    """Holds the converted models of a run, and names what is in them."""

    def __init__(self) -> None:
        self._conversions: dict[int, tuple[nn.Module, Conversion]] = {}

    def __contains__(self, model: object) -> bool:
        return id(model) in self._conversions

    def add(self, model: nn.Module, conversion: Conversion) -> None:
        """Take in a model and what was done to it."""
        self._conversions[id(model)] = (model, conversion)

    def update(self) -> list[Change]:
        """Convert what has come into a model since the last call, give back what has gone; return the changes."""
        changes = [conversion.update() for _, conversion in self._conversions.values()]
        return [change for change in changes if change.came or change.went]

    def undo(self) -> None:
        """Give every layer its class back, and let go of the models."""
        for _, conversion in self._conversions.values():
            conversion.undo()
        self._conversions = {}

    def _named(self) -> Iterator[tuple[str, nn.Module, Conversion]]:
        """Yield every model and what its names begin with: several may have equal ones."""
        for number, (model, conversion) in enumerate(self._conversions.values()):
            yield f"{number}:" if number else "", model, conversion

    def states(self) -> dict[str, LayerState]:
        """Return layer name -> state, of every converted layer."""
        return {
            prefix + name: state for prefix, _, conversion in self._named() for name, state in conversion.states.items()
        }

    def parameters(self) -> Named:
        """Return names and parameters of the models as they are now."""
        return [(prefix + name, p) for prefix, model, _ in self._named() for name, p in model.named_parameters()]

    @property
    def layers(self) -> int:
        """How many layers are converted."""
        return sum(conversion.layers for _, conversion in self._conversions.values())

    def saved_bytes(self) -> tuple[int, int]:
        """Return the bytes converted layers kept for backward in their last forward, and float32 would have kept."""
        pairs = [conversion.saved_bytes() for _, conversion in self._conversions.values()]
        return sum(kept for kept, _ in pairs), sum(full for _, full in pairs)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        parameters = (p for model, _ in self._conversions.values() for p in model.parameters())
        return next((p.device for p in parameters), torch.device("cpu"))

    @property
    def trainer(self) -> Any | None:
        """The Trainer of the run; None with Fabric."""
        trainers = (trainer_of(model) for model, _ in self._conversions.values())
        return next((trainer for trainer in trainers if trainer is not None), None)
