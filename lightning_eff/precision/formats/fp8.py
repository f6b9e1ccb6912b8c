"""FP8 as layers use it: E4M3 inputs and weights, E5M2 gradients; a scale per tensor, or (rowwise) per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_eff.functional import DelayedScale, fp8_codes, saturated_share, zero_share
from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.fp8 import FP8_E4M3, FP8_E5M2, LARGEST
from lightning_eff.kernels.capability import native_fp8
from lightning_eff.kernels.fp8 import fp8_decode, fp8_encode
from lightning_eff.kernels.fp8_rows import fp8_encode_along, fp8_encode_both
from lightning_eff.kernels.products import scratch
from lightning_eff.kernels.quantize import largest_magnitude
from lightning_eff.precision.formats.base import Format, GradCodes, SavedInput, WeightCodes
from lightning_eff.precision.formats.history import Memory

if TYPE_CHECKING:
    from lightning_eff.precision.formats.config import FP8Config
    from lightning_eff.precision.layers.state import LayerState


def _buffer(name: str, x: Tensor) -> Tensor | None:
    return scratch(name, x.numel(), torch.bfloat16) if x.device.type == "cpu" else None


@dataclass(frozen=True)
class FP8Format(Format):
    """One scale per tensor, dynamic or delayed. See :class:`lightning_eff.precision.formats.base.Format`."""

    config: FP8Config

    def native(self, device: torch.device) -> bool:
        """Whether products run on FP8 units; else FP8 values are multiplied as bfloat16, which holds them exactly."""
        return self.config.products == "native" or (self.config.products == "auto" and native_fp8(device))

    def memories(self) -> dict[str, Memory]:
        """The histories of delayed scaling."""
        if self.config.scaling != "delayed":
            return {}
        options = {"history": self.config.history, "margin": self.config.margin}
        return {role: Memory(DelayedScale(**options)) for role in ("input", "weight", "grad")}

    def _encode(
        self, role: str, x: Tensor, dtype: torch.dtype, state: LayerState, *, keep: bool = False
    ) -> tuple[Codes, Tensor | None]:
        """Codes as the products want them; with delayed scaling, the maximum of ``x`` goes to the role's memory."""
        memory, observed, max_abs = state.memories.get(role), None, None
        if memory is not None:
            max_abs = memory.estimate.max_abs
            max_abs = float(largest_magnitude(x)) if max_abs is None else max_abs
            observed = torch.empty((), dtype=torch.float32, device=x.device)
        native = self.native(x.device)
        codes, kept = fp8_encode(
            x,
            dtype,
            power_of_two=self.config.whole_octaves,
            keep=keep or native,
            out=None if role == "weight" else _buffer(role, x),
            max_abs=max_abs,
            observed=observed,
        )
        if memory is not None and observed is not None:
            memory.observe(observed)
        return (Codes(kept, codes.scale) if native and kept is not None else codes), kept

    def encode_weight(self, weight: Tensor, state: LayerState) -> WeightCodes:
        """E4M3 values."""
        codes = self._encode("weight", weight, FP8_E4M3, state)[0]
        return WeightCodes(codes, codes)

    def encode_input(self, x: Tensor, state: LayerState, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """E4M3 values; kept as bytes."""
        codes, kept = self._encode("input", x, FP8_E4M3, state, keep=save)
        if kept is None or not save:
            return codes, None
        return codes, SavedInput(kept.view(torch.uint8).reshape(-1), codes.scale.reshape(1))

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """The E4M3 values of the bytes."""
        kept = saved.packed.view(FP8_E4M3).view(tuple(shape))
        if self.native(kept.device):
            return Codes(kept, saved.scale[0])
        return Codes(fp8_decode(kept, out=_buffer("input", kept)), saved.scale[0])

    def encode_grad(self, grad: Tensor, state: LayerState) -> GradCodes:
        """E5M2 values."""
        codes = self._encode("grad", grad, FP8_E5M2, state)[0]
        return GradCodes(codes, [codes])

    def grad_figures(self, grad: Tensor, codes: Codes, state: LayerState) -> dict[str, Tensor]:
        """Shares of non-zero elements that became zero, and of values at the top."""
        values, top = (
            codes.codes.to(torch.bfloat16),
            LARGEST[FP8_E4M3 if self.config.scaling == "rowwise" else FP8_E5M2],
        )
        lost = zero_share(values) - zero_share(grad)
        return {"grad_underflow": lost, "grad_saturated": saturated_share(values, int(top))}


@dataclass(frozen=True)
class RowwiseFP8Format(FP8Format):
    """E4M3 everywhere, in linear layers with a scale for each row that a product sums over; convolutions tensorwise.

    Every tensor is in two products that sum over different dimensions, so each is cast twice.
    """

    one_code_for_all = False

    def saved_scales(self, columns: int | None) -> int:
        """One for each input feature, because the weight gradient sums over the rows."""
        return columns or 1

    def _rows(self, role: str, x: Tensor) -> Codes:
        """A scale per row."""
        octaves = self.config.whole_octaves
        if self.native(x.device):
            return fp8_codes(x, FP8_E4M3, power_of_two=octaves, dim=1)
        return fp8_encode_along(x, FP8_E4M3, 1, power_of_two=octaves, out=_buffer(role, x))[0]

    def _both(self, role: str, x: Tensor, *, keep: bool = False) -> tuple[Codes, Codes]:
        """A scale per row, and a scale per column; the latter as E4M3 if ``keep``."""
        octaves = self.config.whole_octaves
        if self.native(x.device):
            return self._rows(role, x), fp8_codes(x, FP8_E4M3, power_of_two=octaves, dim=0)
        out = columns = None
        if role != "weight":
            out, columns = _buffer(role, x), None if keep else _buffer(f"{role}_columns", x)
        return fp8_encode_both(x, FP8_E4M3, power_of_two=octaves, keep_columns=keep, out=out, out_columns=columns)

    def encode_weight(self, weight: Tensor, state: LayerState) -> WeightCodes:
        """A scale per output for the output, a scale per input for the input gradient."""
        if weight.dim() != 2:
            return super().encode_weight(weight, state)
        return WeightCodes(*self._both("weight", weight))

    def encode_input(self, x: Tensor, state: LayerState, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """A scale per row for the output; kept with a scale per column."""
        if x.dim() != 2:
            return super().encode_input(x, state, save=save)
        if not save:
            return self._rows("input", x), None
        codes, kept = self._both("input", x, keep=True)
        return codes, SavedInput(kept.codes.view(torch.uint8).reshape(-1), kept.scale.reshape(-1))

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """The E4M3 values of the bytes."""
        if len(shape) != 2:
            return super().restore_input(saved, shape)
        kept = saved.packed.view(FP8_E4M3).view(tuple(shape))
        codes = kept if self.native(kept.device) else fp8_decode(kept, out=_buffer("input", kept))
        return Codes(codes, saved.scale.view(1, -1))

    def encode_grad(self, grad: Tensor, state: LayerState) -> GradCodes:
        """A scale per row for the input gradient, a scale per output for the weight gradient."""
        if grad.dim() != 2:
            codes = self._encode("grad", grad, FP8_E4M3, state)[0]
            return GradCodes(codes, [codes])
        rows, columns = self._both("grad", grad)
        return GradCodes(rows, [columns])
