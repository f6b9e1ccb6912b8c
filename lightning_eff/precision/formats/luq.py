"""The 4-bit formats of LUQ as layers use them: INT4 inputs and weights (SAWB), FP4 gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_eff.functional import HindsightMax, saturated_share, zero_share
from lightning_eff.functional.codes import Codes
from lightning_eff.kernels.capability import native_int8
from lightning_eff.kernels.products import scratch
from lightning_eff.kernels.quantize import largest_magnitude, luq_codes, sawb_encode, unpack_int4
from lightning_eff.precision.formats.base import Format, GradCodes, SavedInput, WeightCodes
from lightning_eff.precision.formats.history import Memory

if TYPE_CHECKING:
    from lightning_eff.precision.formats.config import LUQConfig
    from lightning_eff.precision.layers.state import LayerState


def _buffer(name: str, numel: int, device: torch.device) -> Tensor | None:
    return scratch(name, numel, torch.int8) if device.type == "cpu" else None


@dataclass(frozen=True)
class LUQFormat(Format):
    """See :class:`lightning_eff.precision.formats.base.Format`."""

    config: LUQConfig

    nibbles = 1

    def native(self, device: torch.device) -> bool:
        """Whether products run on int8 units."""
        if self.config.levels > 7 or self.config.products == "emulated":
            return False
        return self.config.products == "native" or native_int8(device)

    def memories(self) -> dict[str, Memory]:
        """The in-hindsight maximum of the gradient, if it is used."""
        momentum = self.config.hindsight
        return {} if momentum is None else {"grad": Memory(HindsightMax(momentum))}

    def saved_scales(self, columns: int | None) -> int:
        """The scale, and whether the codes are unsigned."""
        return 2

    def encode_weight(self, weight: Tensor, state: LayerState) -> WeightCodes:
        """INT4 codes."""
        codes = sawb_encode(weight)[0]
        return WeightCodes(codes, codes)

    def encode_input(self, x: Tensor, state: LayerState, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """INT4 codes; kept two to a byte, with (scale, 1 if unsigned)."""
        buffer = _buffer("input", x.numel(), x.device)
        codes, packed, is_unsigned = sawb_encode(x, unsigned=self.config.unsigned, pack=save, out=buffer)
        if packed is None:
            return codes, None
        flag = torch.full((), float(is_unsigned), dtype=torch.float32, device=x.device)
        return codes, SavedInput(packed, torch.stack([codes.scale, flag]))

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """Unpack the INT4 codes."""
        numel = math.prod(shape)
        buffer = _buffer("input", numel, saved.packed.device)
        codes = unpack_int4(saved.packed, numel, unsigned=bool(saved.scale[1]), out=buffer)
        return Codes(codes.view(tuple(shape)), saved.scale[0])

    def encode_grad(self, grad: Tensor, state: LayerState) -> GradCodes:
        """FP4 codes, ``config.samples`` times; in hindsight the maximum is the estimate of the steps before."""
        memory = state.memories.get("grad")
        estimated = memory is not None and not math.isnan(memory.estimate.value)
        largest = memory.estimate.value if memory is not None and estimated else largest_magnitude(grad)
        observed = torch.empty((), dtype=torch.float32, device=grad.device) if estimated else largest
        samples = [
            luq_codes(
                grad,
                levels=self.config.levels,
                max_abs=largest,
                power_of_two=self.config.power_of_two,
                rounding=self.config.gradient_rounding,
                seed=state.seeds.next(),
                out=_buffer(f"grad{i}", grad.numel(), grad.device),
                observed=observed if estimated and i == 0 else None,
            )
            for i in range(self.config.samples)
        ]
        if memory is not None:
            memory.observe(observed)
            if estimated:  # NaN must not pass as the top code
                samples = [Codes(s.codes, torch.where(observed.isfinite(), s.scale, torch.nan)) for s in samples]
        return GradCodes(samples[0], samples)

    def grad_figures(self, grad: Tensor, codes: Codes, state: LayerState) -> dict[str, Tensor]:
        """Shares of zero and of saturated codes."""
        top = 2 ** (self.config.levels - 1)
        return {"grad_zeros": zero_share(codes.codes), "grad_saturated": saturated_share(codes.codes, top)}
