"""A small precision shell and its row, so that these tests do not depend on the arithmetic of a real method."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

from lightning_eff.methods import MethodInfo

INFO = MethodInfo(
    name="demo4",
    kind="precision",
    family="numerics",
    class_name="DemoPrecision",
    mixin="tests.integration.demo_shell:DemoMixin",
    summary="swaps Linear layers for a subclass that computes the same",
    paper="none",
    composes_with=("32-true", "bf16-mixed"),
    strategies=("single_device", "ddp"),
    conflicts=MappingProxyType({"16-mixed": "the scaler is in the way", "model_parallel": "weights are DTensors"}),
)
OTHER = MethodInfo(
    name="other8",
    kind="precision",
    family="numerics",
    class_name="OtherPrecision",
    mixin="tests.integration.demo_shell:DemoMixin",
    summary="another one",
    paper="none",
    composes_with=("32-true",),
    strategies=("single_device",),
)


class DemoLinear(torch.nn.Linear):
    """What a converted layer becomes."""


class DemoMixin:
    """Swap every Linear.

    Args:
        levels: an option.
        smp: another option.
    """

    info = INFO

    def __init__(self, *, levels: int = 7, smp: int = 1) -> None:
        super().__init__()
        self._configure(levels, smp)

    def configure_method(self, *, levels: int = 7, smp: int = 1) -> None:
        self._configure(levels, smp)

    def _configure(self, levels: int, smp: int) -> None:
        self.levels, self.smp, self.inits = levels, smp, getattr(self, "inits", 0) + 1
        self.module: Any = None
        self.calls = 0
        self.loaded: dict[str, Any] = {}

    def convert_module(self, module: Any) -> Any:
        self.module = super().convert_module(module)  # type: ignore[misc]
        for layer in module.modules():
            if type(layer) is torch.nn.Linear:
                layer.__class__ = DemoLinear
        return module

    def teardown(self) -> None:
        super().teardown()  # type: ignore[misc]
        for layer in self.module.modules() if self.module is not None else ():
            if type(layer) is DemoLinear:
                layer.__class__ = torch.nn.Linear
        self.module = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().optimizer_step(*args, **kwargs)  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict
