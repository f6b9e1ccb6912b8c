"""bfloat16 as the study emulates it: operands rounded to bfloat16, float32 sums, results rounded to bfloat16.

A product of bfloat16 codes is rounded to bfloat16 by torch, which outputs and input gradients are to be. The optimizer
reads the float32 sum of a weight gradient: the output gradient is handed over for it as float32, the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_eff.functional import zero_share
from lightning_eff.functional.codes import Codes
from lightning_eff.kernels.products import scratch
from lightning_eff.precision.formats.base import Format, GradCodes, LayerOptions, LayerView, SavedInput, WeightCodes


@dataclass(frozen=True, kw_only=True)
class BF16EmulatedOptions(LayerOptions):
    """Holds the options of ``bf16-emulated``: those of every method with converted layers.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    exempt_first_last: bool = False

    def format(self) -> Format:
        """Return bfloat16."""
        return BF16Format(self)


@dataclass(frozen=True)
class BF16Format(Format):
    """Rounds all three operands to bfloat16; a :class:`~lightning_eff.precision.formats.base.Format`."""

    options: BF16EmulatedOptions

    units = ("native BF16", "BF16, float32 sums")
    operands = "BF16 x BF16, BF16"
    nibbles = 4

    def native(self, device: torch.device) -> bool:
        """Return False: torch chooses how to multiply bfloat16, on units made for it or in float32."""
        return False

    def _encode(self, x: Tensor, *, keep: bool = False) -> Codes:
        values = x.detach().to(torch.bfloat16, copy=keep).contiguous()
        return Codes(values, torch.ones((), dtype=torch.float32, device=x.device))

    def encode_weight(self, weight: Tensor, layer: LayerView) -> WeightCodes:
        """Round a weight to nearest even."""
        codes = self._encode(weight, keep=True)
        return WeightCodes(codes, codes)

    def encode_input(self, x: Tensor, layer: LayerView, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """Round an input to nearest even; it is kept as it is."""
        codes = self._encode(x, keep=save)
        if not save:
            return codes, None
        return codes, SavedInput(codes.codes.reshape(-1).view(torch.uint8), codes.scale.reshape(1))

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """Return what was kept."""
        return Codes(saved.packed.view(torch.bfloat16).view(tuple(shape)), saved.scale[0])

    def encode_grad(self, grad: Tensor, layer: LayerView) -> GradCodes:
        """Round an output gradient to nearest even."""
        codes = self._encode(grad)
        out = scratch("grad", grad.numel(), torch.float32).view(grad.shape) if grad.is_cpu else None
        wide = codes.codes.to(torch.float32) if out is None else out.copy_(codes.codes)
        return GradCodes(codes, [Codes(wide, codes.scale)])

    def store(self, result: Tensor, role: str, layer: LayerView) -> Tensor:
        """Round ``result`` to bfloat16 in place: with the bias added it has more bits than the format."""
        if result.dtype == torch.bfloat16 or role == "weight_grad":  # the optimizer reads the float32 sum
            return result
        return result.copy_(result.to(torch.bfloat16))

    def grad_figures(self, grad: Tensor, codes: Codes, layer: LayerView) -> dict[str, Tensor]:
        """Return the share of non-zero elements that became zero."""
        return {"grad_underflow": zero_share(codes.codes) - zero_share(grad)}
