"""A format that keeps every bit: a converted layer that has it must be the plain layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_eff.functional.codes import Codes
from lightning_eff.precision.formats.base import Format, GradCodes, LayerOptions, LayerView, SavedInput, WeightCodes
from lightning_eff.precision.layers.convert import Conversion, convert


class ExactFormat(Format):
    """float32 values as codes, scale one."""

    nibbles = 8

    def native(self, device: torch.device) -> bool:
        return False

    def _codes(self, x: Tensor) -> Codes:
        values = x.detach().to(torch.float32, copy=True).contiguous()
        return Codes(values, torch.ones((), dtype=torch.float32, device=x.device))

    def encode_weight(self, weight: Tensor, layer: LayerView) -> WeightCodes:
        return WeightCodes(self._codes(weight), self._codes(weight))

    def encode_input(self, x: Tensor, layer: LayerView, *, save: bool) -> tuple[Codes, SavedInput | None]:
        codes = self._codes(x)
        saved = SavedInput(codes.codes.reshape(-1).view(torch.uint8), codes.scale.reshape(1))
        return codes, saved if save else None

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        return Codes(saved.packed.view(torch.float32).view(tuple(shape)), saved.scale[0])

    def encode_grad(self, grad: Tensor, layer: LayerView) -> GradCodes:
        codes = self._codes(grad)
        return GradCodes(codes, [codes])

    def grad_figures(self, grad: Tensor, codes: Codes, layer: LayerView) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, kw_only=True)
class ExactOptions(LayerOptions):
    """Options of the exact format: every layer is converted."""

    exempt_first_last: bool = False

    def format(self) -> Format:
        return ExactFormat()


def exactly_converted(model: nn.Module) -> Conversion:
    """``model`` with every layer that has a twin converted to the exact format."""
    return convert(model, ExactOptions())
