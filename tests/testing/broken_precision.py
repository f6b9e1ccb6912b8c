"""Wrong versions of a precision plugin of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_eff.precision import LUQPrecision


class _Wrong(LUQPrecision):  # type: ignore[misc,valid-type]
    def __init_subclass__(cls) -> None:
        cls.__qualname__ = "LUQPrecision"  # Lightning's key of the state


class Forgetful(_Wrong):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class Miscounts(_Wrong):
    def saved_bytes(self) -> tuple[int, int]:
        kept, full = super().saved_bytes()
        return kept + 1, full


class RoundsNaNAway(_Wrong):
    def convert_module(self, module: nn.Module) -> nn.Module:
        module = super().convert_module(module)
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda _layer, _inputs, output: torch.nan_to_num(output))
        return module


class FollowsTheDefault(_Wrong):
    def convert_module(self, module: nn.Module) -> nn.Module:
        module = super().convert_module(module)
        module.register_forward_hook(
            lambda _module, _inputs, output: (output.float() * torch.tensor(1.01)).to(output.dtype)
        )
        return module


class BreaksTheGraph(_Wrong):
    def convert_module(self, module: nn.Module) -> nn.Module:
        module = super().convert_module(module)
        module.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        return module


class ByRank(_Wrong):
    def state_dict(self) -> dict[str, Any]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return {**super().state_dict(), "calls": rank}
