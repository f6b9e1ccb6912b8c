"""A control that should lose: float16 training without a loss scale, emulated in fp32.

Inputs, weights and outputs of every linear layer and convolution are rounded to float16, and so is every gradient that
passes there, that of the weights included: what overflows becomes infinite, what underflows becomes zero. Weights are
updated, and products are summed, in fp32, as ``torch.autocast`` does; between the layers (residual sums,
normalisations) numbers stay fp32. Autocast itself gives the same losses but has no fast float16 products on most CPUs.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Float16Unscaled"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Float16Values(torch.autograd.Function):
    """float16 values in a float32 tensor, for the tensor and for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.half().float()


class _Rounded(nn.Module):
    """Parametrisation of a weight or bias."""

    def forward(self, x: Tensor) -> Tensor:
        return _Float16Values.apply(x)


def _round_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(_Float16Values.apply(x) for x in inputs)


def _round_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return _Float16Values.apply(output)


class Float16Unscaled(L.Callback):
    """Rounds what goes through a module's layers to float16, from before its optimizers are made."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for layer in list(pl_module.modules()):
            if isinstance(layer, LAYERS):
                layer.register_forward_pre_hook(_round_input)
                layer.register_forward_hook(_round_output)
                for name, _ in list(layer.named_parameters(recurse=False)):
                    parametrize.register_parametrization(layer, name, _Rounded())
