"""The same workloads in the libraries we compare with, converted the way their own documentation shows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._workloads import Workload

__all__ = ["CONVERT", "PEERS", "UnsupportedError", "brevitas", "qpytorch", "torchao"]


class UnsupportedError(Exception):
    """The peer has no form of any layer that is to be converted."""


def _replace(model: nn.Module, names: list[str], make: Callable[[Any], nn.Module]) -> None:
    """Put ``make(layer)`` in the place of every named layer."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))


def qpytorch(work: Workload, optimizer: torch.optim.Optimizer) -> Any:
    """Quantise layer outputs to e4m3 and their gradients to e5m2 with QPyTorch; return its optimiser.

    8 bits, the nearest QPyTorch has to a published recipe; weights are rounded stochastically after each step.
    """
    from qtorch import FloatingPoint
    from qtorch.optim import OptimLP
    from qtorch.quant import Quantizer, quantizer

    forward, backward = FloatingPoint(exp=4, man=3), FloatingPoint(exp=5, man=2)

    class Quantised(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.quantise = layer, Quantizer(forward, backward, "nearest", "stochastic")

        def forward(self, x: Tensor) -> Tensor:
            return self.quantise(self.layer(x))

    _replace(work.model, work.converted_names(), Quantised)
    return OptimLP(optimizer, weight_quant=quantizer(forward_number=forward, forward_rounding="stochastic"))


def brevitas(work: Workload) -> None:
    """Replace layers by Brevitas' INT4 quantisation-aware ones: 4-bit weights and inputs, full-precision backward."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat

    options: dict[str, Any] = {"weight_bit_width": 4, "input_quant": Int8ActPerTensorFloat, "input_bit_width": 4}

    def convert(layer: nn.Linear | nn.Conv2d) -> nn.Module:
        bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            made: nn.Module = qnn.QuantLinear(layer.in_features, layer.out_features, bias=bias, **options)
        else:
            shape = {"stride": layer.stride, "padding": layer.padding, "bias": bias}
            made = qnn.QuantConv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **shape, **options)
        made.load_state_dict(layer.state_dict(), strict=False)
        return made.to(layer.weight.device)

    _replace(work.model, work.converted_names(), convert)


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep warnings about another platform's extensions out of the output; restore what was disabled before."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def torchao(work: Workload, recipe: str) -> None:
    """Convert the linear layers among those that are quantised to torchao's float8 training.

    On a CPU its products are emulated (``emulate=True``): operands are rounded to FP8 and multiplied in fp32. On CUDA
    its own kernels run.

    Args:
        work: converted in place.
        recipe: ``tensorwise`` or ``rowwise``, torchao's names.

    Raises:
        UnsupportedError: none of the layers is linear.
    """
    with _silenced():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        names = {name for name in work.converted_names() if isinstance(work.model.get_submodule(name), nn.Linear)}
        if not names:
            raise UnsupportedError(
                "torchao's float8 training converts linear layers, and this model has none to convert"
            )
        config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=work.x.device.type == "cpu")
        convert_to_float8_training(work.model, config=config, module_filter_fn=lambda _module, name: name in names)


CONVERT: dict[str, Callable[[Workload], None]] = {
    "brevitas": brevitas,
    "torchao": functools.partial(torchao, recipe="tensorwise"),
    "torchao-rowwise": functools.partial(torchao, recipe="rowwise"),
}
"""Peer -> conversion of the layers; QPyTorch wraps the optimiser as well."""
PEERS = ("qpytorch", *CONVERT)
