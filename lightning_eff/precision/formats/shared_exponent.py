"""16-bit integers with a shared exponent as layers use them: DFP-16 (exponent measured) and Flexpoint (predicted)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_eff.functional import saturated_share, zero_share
from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.flexpoint import Autoflex
from lightning_eff.kernels.capability import native_int16
from lightning_eff.kernels.products import scratch
from lightning_eff.kernels.quantize import largest_magnitude
from lightning_eff.kernels.shared_exponent import dfp_encode, integer_encode, round_to_scale_
from lightning_eff.precision.formats.base import Format, GradCodes, SavedInput, WeightCodes
from lightning_eff.precision.formats.history import Memory

if TYPE_CHECKING:
    from lightning_eff.precision.formats.config import FlexpointConfig, IntegerConfig
    from lightning_eff.precision.layers.state import LayerState

LARGEST = 2**15 - 1


@dataclass(frozen=True)
class DFP16Format(Format):
    """One exponent for a tensor, from its largest magnitude; a :class:`~.base.Format`."""

    config: IntegerConfig

    nibbles = 4

    def native(self, device: torch.device) -> bool:
        """Whether products run on int16 units, integer sums in chains that cannot overflow; else they are emulated."""
        return self.config.products == "native" or (self.config.products == "auto" and native_int16(device))

    def _encode(self, role: str, x: Tensor, state: LayerState, *, keep: bool = False) -> Codes:
        """Codes in a buffer, or in a tensor of their own if they are to be kept."""
        return dfp_encode(x, out=_buffer(role, x, keep=keep))

    def encode_weight(self, weight: Tensor, state: LayerState) -> WeightCodes:
        """int16."""
        codes = self._encode("weight", weight, state, keep=True)
        return WeightCodes(codes, codes)

    def encode_input(self, x: Tensor, state: LayerState, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """int16; what is kept are the codes themselves."""
        codes = self._encode("input", x, state, keep=save)
        if not save:
            return codes, None
        return codes, SavedInput(codes.codes.reshape(-1).view(torch.uint8), codes.scale.reshape(1))

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """The codes that were kept."""
        return Codes(saved.packed.view(torch.int16).view(tuple(shape)), saved.scale[0])

    def encode_grad(self, grad: Tensor, state: LayerState) -> GradCodes:
        """int16."""
        codes = self._encode("grad", grad, state)
        return GradCodes(codes, [codes])

    def grad_figures(self, grad: Tensor, codes: Codes, state: LayerState) -> dict[str, Tensor]:
        """Shares of non-zero elements that became zero, and of codes at the end of the range."""
        lost = zero_share(codes.codes) - zero_share(grad)
        return {"grad_underflow": lost, "grad_saturated": saturated_share(codes.codes, LARGEST)}


def _buffer(role: str, x: Tensor, *, keep: bool) -> Tensor | None:
    return None if keep or x.device.type != "cpu" else scratch(role, x.numel(), torch.int16)


class AgreedAutoflex(Autoflex):
    """An Autoflex whose first step, which every rank begins from its own tensor, ends with one scale for all."""

    def update(self, max_abs: float) -> bool:
        """Start anew from the largest of all ranks after the first step, then as always."""
        if not self.history:
            self.initialise(max_abs)
        return super().update(max_abs)


@dataclass(frozen=True)
class FlexpointFormat(DFP16Format):
    """One exponent for a tensor, predicted by Autoflex from the steps before; results of products are stored so too."""

    config: FlexpointConfig

    def memories(self) -> dict[str, Memory]:
        """One Autoflex for each tensor a layer reads or writes."""
        written = ("output", "input_grad", "weight_grad") if self.config.store_results else ()
        return {role: Memory(self.config.autoflex()) for role in ("input", "weight", "grad", *written)}

    def _scale(self, role: str, x: Tensor, state: LayerState) -> Tensor:
        flex = state.memories[role].estimate
        if not flex.initialised:
            flex.initialise(float(largest_magnitude(x)))
        return torch.tensor(flex.scale, dtype=torch.float32, device=x.device)

    def _encode(self, role: str, x: Tensor, state: LayerState, *, keep: bool = False) -> Codes:
        scale = self._scale(role, x, state)
        if role == "weight" and (written := state.written.get(x.data_ptr())) is not None:
            scale = torch.tensor(written, dtype=torch.float32, device=x.device)  # it lies on this grid already
        observed = torch.empty((), dtype=torch.float32, device=x.device)
        codes = integer_encode(x, scale, out=_buffer(role, x, keep=keep), observed=observed)
        state.memories[role].observe(observed)
        return codes

    def store(self, result: Tensor, role: str, state: LayerState) -> Tensor:
        """``result``, rounded in place to the exponent predicted for it."""
        if role not in state.memories:
            return result
        observed = torch.empty((), dtype=torch.float32, device=result.device)
        round_to_scale_(result, self._scale(role, result, state), observed=observed)
        state.memories[role].observe(observed)
        return result

    def grad_figures(self, grad: Tensor, codes: Codes, state: LayerState) -> dict[str, Tensor]:
        """As above, and how many of the layer's writes have not fitted their predicted exponent so far."""
        overflows = sum(memory.estimate.overflows for memory in state.memories.values())
        return {
            **super().grad_figures(grad, codes, state),
            "overflows": torch.tensor(float(overflows), dtype=torch.float32, device="cpu"),
        }
