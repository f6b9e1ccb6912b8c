"""FP8 as layers use it: E4M3 inputs and weights, E5M2 gradients; a scale per tensor, or (rowwise) per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_eff.checks import Choice, Maybe, Rule, YesNo
from lightning_eff.functional import DelayedScale, fp8_codes, saturated_share, zero_share
from lightning_eff.functional.codes import Codes
from lightning_eff.functional.numerics.fp8 import FP8_E4M3, FP8_E5M2, HISTORY, LARGEST, MARGIN
from lightning_eff.kernels.capability import native_fp8
from lightning_eff.kernels.fp8 import ALIGNMENT, fp8_decode, fp8_encode
from lightning_eff.kernels.fp8_rows import fp8_encode_along, fp8_encode_both
from lightning_eff.kernels.products import scratch
from lightning_eff.kernels.quantize import largest_magnitude
from lightning_eff.precision.formats.base import Format, GradCodes, LayerOptions, LayerView, SavedInput, WeightCodes
from lightning_eff.precision.formats.history import History

Scaling = Literal["tensorwise", "rowwise", "delayed"]
SLOW_FEATURES, SLOW_CHANNELS = 64, 16
"""Linear layers (``python -m benchmarks.layers``) and convolutions up to this size are not clearly faster on a CPU."""


@dataclass(frozen=True, kw_only=True)
class FP8Options(LayerOptions):
    """Holds the options of ``fp8``; :class:`lightning_eff.precision.fp8.FP8Mixin` says what they mean.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    scaling: Scaling = "tensorwise"
    power_of_two: bool | None = None
    history: int = 1024
    margin: int = 0
    filter_slow: bool = True

    RULES: ClassVar[Mapping[str, Rule]] = {
        **LayerOptions.RULES,
        "scaling": Choice(*get_args(Scaling)),
        "power_of_two": Maybe(YesNo()),
        "history": HISTORY,
        "margin": MARGIN,
        "filter_slow": YesNo(),
    }

    @property
    def whole_octaves(self) -> bool:
        """Whether scales are powers of two."""
        return self.scaling == "rowwise" if self.power_of_two is None else self.power_of_two

    def format(self) -> Format:
        """Return E4M3 with E5M2 gradients; rowwise E4M3 alone."""
        return RowwiseFP8Format(self) if self.scaling == "rowwise" else FP8Format(self)

    def too_slow(self, shape: Sequence[int], device: torch.device) -> str:
        """Name the sizes not clearly faster than float32 at any batch size (CPU); those torchao leaves out (CUDA)."""
        if not self.filter_slow or len(shape) < 2:
            return ""
        outputs, inputs = shape[:2]
        if device.type != "cuda":
            small = min(outputs, inputs) <= (SLOW_FEATURES if len(shape) == 2 else SLOW_CHANNELS)
        elif len(shape) > 2:  # nobody measured
            small = False
        elif self.scaling == "rowwise":
            small = outputs <= 2048 or inputs <= 1024 or (outputs <= 4096 and inputs <= 2048)
        else:
            small = inputs <= 4096 and outputs <= 1024
        if len(shape) == 2 and device.type == "cuda" and (outputs % ALIGNMENT or inputs % ALIGNMENT):
            return f"sizes are no multiples of {ALIGNMENT}: padding would cost more (filter_slow=False converts it)"
        return f"too small to get faster on {device.type} (filter_slow=False converts it)" if small else ""


def _buffer(name: str, x: Tensor) -> Tensor | None:
    return scratch(name, x.numel(), torch.bfloat16) if x.device.type == "cpu" else None


@dataclass(frozen=True)
class FP8Format(Format):
    """Scales whole tensors, dynamic or delayed; a :class:`~lightning_eff.precision.formats.base.Format`."""

    options: FP8Options

    units = ("native FP8", "as bfloat16, float32 sums")

    @property
    def operands(self) -> str:
        """The formats of input, weight and gradient, and how they are scaled."""
        return f"E4M3 x E4M3, E5M2, {self.options.scaling}"

    def native(self, device: torch.device) -> bool:
        """Return whether products run on FP8 units; else values are multiplied as bfloat16, which holds them."""
        return self.options.products == "native" or (self.options.products == "auto" and native_fp8(device))

    def histories(self) -> dict[str, History]:
        """Return those of delayed scaling."""
        if self.options.scaling != "delayed":
            return {}
        length, margin = self.options.history, self.options.margin
        return {role: History(DelayedScale(history=length, margin=margin)) for role in ("input", "weight", "grad")}

    def _encode(
        self, role: str, x: Tensor, dtype: torch.dtype, layer: LayerView, *, keep: bool = False
    ) -> tuple[Codes, Tensor | None]:
        """Encode as the products want it; with delayed scaling, the maximum of ``x`` goes to the role's history."""
        history, observed, max_abs = layer.histories.get(role), None, None
        if history is not None:
            max_abs = history.estimate_as(DelayedScale).max_abs
            max_abs = float(largest_magnitude(x)) if max_abs is None else max_abs
            observed = torch.empty((), dtype=torch.float32, device=x.device)
        native = self.native(x.device)
        codes, kept = fp8_encode(
            x,
            dtype,
            power_of_two=self.options.whole_octaves,
            keep=keep or native,
            out=None if role == "weight" else _buffer(role, x),
            max_abs=max_abs,
            observed=observed,
        )
        if history is not None and observed is not None:
            history.observe(observed)
        return (Codes(kept, codes.scale) if native and kept is not None else codes), kept

    def encode_weight(self, weight: Tensor, layer: LayerView) -> WeightCodes:
        """Encode a weight in E4M3."""
        codes = self._encode("weight", weight, FP8_E4M3, layer)[0]
        return WeightCodes(codes, codes)

    def encode_input(self, x: Tensor, layer: LayerView, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """Encode an input in E4M3; it is kept as bytes."""
        codes, kept = self._encode("input", x, FP8_E4M3, layer, keep=save)
        if kept is None or not save:
            return codes, None
        return codes, SavedInput(kept.view(torch.uint8).reshape(-1), codes.scale.reshape(1))

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """Return the E4M3 values of the bytes."""
        kept = saved.packed.view(FP8_E4M3).view(tuple(shape))
        if self.native(kept.device):
            return Codes(kept, saved.scale[0])
        return Codes(fp8_decode(kept, out=_buffer("input", kept)), saved.scale[0])

    def encode_grad(self, grad: Tensor, layer: LayerView) -> GradCodes:
        """Encode an output gradient in E5M2."""
        codes = self._encode("grad", grad, FP8_E5M2, layer)[0]
        return GradCodes(codes, [codes])

    def grad_figures(self, grad: Tensor, codes: Codes, layer: LayerView) -> dict[str, Tensor]:
        """Return the shares of non-zero elements that became zero, and of values at the top."""
        values, top = (
            codes.codes.to(torch.bfloat16),
            LARGEST[FP8_E4M3 if self.options.scaling == "rowwise" else FP8_E5M2],
        )
        lost = zero_share(values) - zero_share(grad)
        return {"grad_underflow": lost, "grad_saturated": saturated_share(values, int(top))}


@dataclass(frozen=True)
class RowwiseFP8Format(FP8Format):
    """Scales each row that a product of a linear layer sums over, E4M3 everywhere; convolutions are tensorwise.

    Every tensor is in two products that sum over different dimensions, so each is cast twice.
    """

    one_code_for_all = False

    @property
    def operands(self) -> str:
        """The formats of input, weight and gradient, and how they are scaled."""
        return f"E4M3 x E4M3, E4M3, {self.options.scaling}"

    def saved_scales(self, columns: int | None) -> int:
        """Return one for each input feature, because the weight gradient sums over the rows."""
        return columns or 1

    def _rows(self, role: str, x: Tensor) -> Codes:
        """Encode a matrix with a scale per row."""
        octaves = self.options.whole_octaves
        if self.native(x.device):
            return fp8_codes(x, FP8_E4M3, power_of_two=octaves, dim=1)
        return fp8_encode_along(x, FP8_E4M3, 1, power_of_two=octaves, out=_buffer(role, x))[0]

    def _both(self, role: str, x: Tensor, *, keep: bool = False) -> tuple[Codes, Codes]:
        """Encode a matrix with a scale per row, and with a scale per column; the latter as E4M3 if ``keep``."""
        octaves = self.options.whole_octaves
        if self.native(x.device):
            return self._rows(role, x), fp8_codes(x, FP8_E4M3, power_of_two=octaves, dim=0)
        out = columns = None
        if role != "weight":
            out, columns = _buffer(role, x), None if keep else _buffer(f"{role}_columns", x)
        return fp8_encode_both(x, FP8_E4M3, power_of_two=octaves, keep_columns=keep, out=out, out_columns=columns)

    def encode_weight(self, weight: Tensor, layer: LayerView) -> WeightCodes:
        """Encode a weight with a scale per output (for the output) and one per input (for the input gradient)."""
        if weight.dim() != 2:
            return super().encode_weight(weight, layer)
        return WeightCodes(*self._both("weight", weight))

    def encode_input(self, x: Tensor, layer: LayerView, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """Encode an input with a scale per row for the output; it is kept with a scale per column."""
        if x.dim() != 2:
            return super().encode_input(x, layer, save=save)
        if not save:
            return self._rows("input", x), None
        codes, kept = self._both("input", x, keep=True)
        return codes, SavedInput(kept.codes.view(torch.uint8).reshape(-1), kept.scale.reshape(-1))

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """Return the E4M3 values of the bytes."""
        if len(shape) != 2:
            return super().restore_input(saved, shape)
        kept = saved.packed.view(FP8_E4M3).view(tuple(shape))
        codes = kept if self.native(kept.device) else fp8_decode(kept, out=_buffer("input", kept))
        return Codes(codes, saved.scale.view(1, -1))

    def encode_grad(self, grad: Tensor, layer: LayerView) -> GradCodes:
        """Encode a gradient with a scale per row (for the input's gradient) and per output (for the weight's)."""
        if grad.dim() != 2:
            codes = self._encode("grad", grad, FP8_E4M3, layer)[0]
            return GradCodes(codes, [codes])
        rows, columns = self._both("grad", grad)
        return GradCodes(rows, [columns])
