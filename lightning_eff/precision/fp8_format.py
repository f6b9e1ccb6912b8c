"""FP8 as layers use it: E4M3 inputs and weights, E5M2 gradients, one dynamic scale per tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_eff.functional import saturated_share, zero_share
from lightning_eff.functional.formats import Codes
from lightning_eff.functional.fp8 import E4M3, E5M2, LARGEST
from lightning_eff.kernels.fp8 import fp8_decode, fp8_encode
from lightning_eff.kernels.products import scratch
from lightning_eff.precision.formats import SavedInput

if TYPE_CHECKING:
    from lightning_eff.precision.config import FP8Config
    from lightning_eff.precision.state import LayerState


def _buffer(name: str, x: Tensor) -> Tensor | None:
    return scratch(name, x.numel(), torch.bfloat16) if x.device.type == "cpu" else None


@dataclass(frozen=True)
class FP8Format:
    """See :class:`lightning_eff.precision.formats.Format`."""

    config: FP8Config

    nibbles = 2
    code_dtype = torch.bfloat16

    def native(self, device: torch.device) -> bool:
        """Never: FP8 values are multiplied as bfloat16, which holds them exactly."""
        return False

    def _encode(self, name: str, x: Tensor, dtype: torch.dtype, *, keep: bool = False) -> tuple[Codes, Tensor | None]:
        return fp8_encode(x, dtype, power_of_two=self.config.power_of_two, keep=keep, out=_buffer(name, x))

    def encode_weight(self, weight: Tensor) -> Codes:
        """E4M3 values."""
        return fp8_encode(weight, E4M3, power_of_two=self.config.power_of_two)[0]

    def encode_input(self, x: Tensor, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """E4M3 values; kept as bytes."""
        codes, kept = self._encode("input", x, E4M3, keep=save)
        if kept is None:
            return codes, None
        return codes, SavedInput(kept.view(torch.uint8).reshape(-1), torch.stack([codes.scale, codes.scale]))

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """The E4M3 values of the bytes."""
        kept = saved.packed.view(E4M3)
        return Codes(fp8_decode(kept, out=_buffer("input", kept)).view(tuple(shape)), saved.scale[0])

    def encode_grad(self, grad: Tensor, state: LayerState) -> list[Codes]:
        """E5M2 values."""
        return [self._encode("grad", grad, E5M2)[0]]

    def grad_figures(self, grad: Tensor, codes: Codes) -> dict[str, Tensor]:
        """Shares of non-zero elements that became zero, and of values at the top."""
        lost = zero_share(codes.codes) - zero_share(grad)
        return {"grad_underflow": lost, "grad_saturated": saturated_share(codes.codes, int(LARGEST[E5M2]))}
