"""16-bit integers with a shared exponent as layers use them: DFP-16 (exponent measured) and Flexpoint (predicted)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_eff.checks import Choice, Rule, YesNo
from lightning_eff.functional import saturated_share, zero_share
from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.flexpoint import ALPHA, BETA, GAMMA, LENGTH, Autoflex
from lightning_eff.functional.numerics.float_format import ROUNDING, FloatRounding
from lightning_eff.kernels.capability import native_int16
from lightning_eff.kernels.products import scratch
from lightning_eff.kernels.quantize import largest_magnitude
from lightning_eff.kernels.shared_exponent import dfp_encode, integer_encode, round_to_scale_
from lightning_eff.precision.formats.base import Format, GradCodes, LayerOptions, LayerView, SavedInput, WeightCodes
from lightning_eff.precision.formats.history import History

LARGEST = 2**15 - 1
MasterWeights = Literal["float32", "flex16"]


@dataclass(frozen=True, kw_only=True)
class DFP16Options(LayerOptions):
    """Holds the options of ``dfp16``: those of every method with converted layers.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    exempt_first_last: bool = False

    def format(self) -> Format:
        """Return int16 with a measured exponent."""
        return DFP16Format(self)


@dataclass(frozen=True, kw_only=True)
class FlexpointOptions(DFP16Options):
    """Holds the options of ``flexpoint16``; :class:`lightning_eff.precision.flexpoint.FlexpointMixin` explains them.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    alpha: float = Autoflex.alpha
    beta: float = Autoflex.beta
    gamma: float = Autoflex.gamma
    length: int = Autoflex.length
    store_results: bool = True
    weights: MasterWeights = "float32"
    weight_rounding: FloatRounding = "nearest"

    RULES: ClassVar[Mapping[str, Rule]] = {
        **DFP16Options.RULES,
        "alpha": ALPHA,
        "beta": BETA,
        "gamma": GAMMA,
        "length": LENGTH,
        "store_results": YesNo(),
        "weights": Choice(*get_args(MasterWeights)),
        "weight_rounding": ROUNDING,
    }

    def autoflex(self) -> AgreedAutoflex:
        """Return the exponent management of a new tensor."""
        return AgreedAutoflex(alpha=self.alpha, beta=self.beta, gamma=self.gamma, length=self.length)

    def format(self) -> Format:
        """Return int16 with a predicted exponent."""
        return FlexpointFormat(self)


@dataclass(frozen=True)
class DFP16Format(Format):
    """Measures a tensor's exponent from its largest magnitude; a :class:`~.base.Format`."""

    options: DFP16Options

    units = ("native int16", "emulated exactly")
    operands = "INT16 x INT16, INT16 (DFP)"
    nibbles = 4

    def native(self, device: torch.device) -> bool:
        """Return whether products run on int16 units, in chains that cannot overflow; else they are emulated."""
        return self.options.products == "native" or (self.options.products == "auto" and native_int16(device))

    def _encode(self, role: str, x: Tensor, layer: LayerView, *, keep: bool = False) -> Codes:
        """Encode into a buffer, or into a tensor of its own if the codes are to be kept."""
        return dfp_encode(x, out=_buffer(role, x, keep=keep))

    def encode_weight(self, weight: Tensor, layer: LayerView) -> WeightCodes:
        """Encode a weight in int16."""
        codes = self._encode("weight", weight, layer, keep=True)
        return WeightCodes(codes, codes)

    def encode_input(self, x: Tensor, layer: LayerView, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """Encode an input in int16; the codes themselves are kept."""
        codes = self._encode("input", x, layer, keep=save)
        if not save:
            return codes, None
        return codes, SavedInput(codes.codes.reshape(-1).view(torch.uint8), codes.scale.reshape(1))

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """Return the codes that were kept."""
        return Codes(saved.packed.view(torch.int16).view(tuple(shape)), saved.scale[0])

    def encode_grad(self, grad: Tensor, layer: LayerView) -> GradCodes:
        """Encode an output gradient in int16."""
        codes = self._encode("grad", grad, layer)
        return GradCodes(codes, [codes])

    def grad_figures(self, grad: Tensor, codes: Codes, layer: LayerView) -> dict[str, Tensor]:
        """Return the shares of non-zero elements that became zero, and of codes at the end of the range."""
        lost = zero_share(codes.codes) - zero_share(grad)
        return {"grad_underflow": lost, "grad_saturated": saturated_share(codes.codes, LARGEST)}


def _buffer(role: str, x: Tensor, *, keep: bool) -> Tensor | None:
    return None if keep or x.device.type != "cpu" else scratch(role, x.numel(), torch.int16)


class AgreedAutoflex(Autoflex):
    """Ends its first step, which every rank begins from its own tensor, with one scale for all."""

    def update(self, max_abs: float) -> bool:
        """Start anew from the largest of all ranks after the first step, then as always."""
        if not self.history:
            self.initialise(max_abs)
        return super().update(max_abs)


@dataclass(frozen=True)
class FlexpointFormat(DFP16Format):
    """Predicts a tensor's exponent by Autoflex from the steps before; results of products are stored so too."""

    options: FlexpointOptions

    operands = "INT16 x INT16, INT16 (Autoflex)"

    def histories(self) -> dict[str, History]:
        """Return an Autoflex for each tensor a layer reads or writes."""
        written = ("output", "input_grad", "weight_grad") if self.options.store_results else ()
        return {role: History(self.options.autoflex()) for role in ("input", "weight", "grad", *written)}

    def _scale(self, role: str, x: Tensor, layer: LayerView) -> Tensor:
        flex = layer.histories[role].estimate_as(Autoflex)
        if not flex.initialised:
            flex.initialise(float(largest_magnitude(x)))
        return torch.tensor(flex.scale, dtype=torch.float32, device=x.device)

    def _encode(self, role: str, x: Tensor, layer: LayerView, *, keep: bool = False) -> Codes:
        scale = self._scale(role, x, layer)
        if role == "weight" and (written := layer.written.get(x.data_ptr())) is not None:
            scale = torch.tensor(written, dtype=torch.float32, device=x.device)  # it lies on this grid already
        observed = torch.empty((), dtype=torch.float32, device=x.device)
        codes = integer_encode(x, scale, out=_buffer(role, x, keep=keep), observed=observed)
        layer.histories[role].observe(observed)
        return codes

    def store(self, result: Tensor, role: str, layer: LayerView) -> Tensor:
        """Round ``result`` in place to the exponent predicted for it."""
        if role not in layer.histories:
            return result
        observed = torch.empty((), dtype=torch.float32, device=result.device)
        round_to_scale_(result, self._scale(role, result, layer), observed=observed)
        layer.histories[role].observe(observed)
        return result

    def grad_figures(self, grad: Tensor, codes: Codes, layer: LayerView) -> dict[str, Tensor]:
        """Return DFP-16's figures, and how many of the layer's writes have not fitted their exponent so far."""
        overflows = sum(history.estimate_as(Autoflex).overflows for history in layer.histories.values())
        return {
            **super().grad_figures(grad, codes, layer),
            "overflows": torch.tensor(float(overflows), dtype=torch.float32, device="cpu"),
        }
