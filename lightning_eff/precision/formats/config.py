"""The options of the methods that convert layers, checked once, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from lightning_eff.checks import ON_NONFINITE, Choice, Maybe, Names, Rule, Whole, YesNo, check, checked
from lightning_eff.errors import ConfigurationError
from lightning_eff.functional.numerics.flexpoint import ALPHA, BETA, GAMMA, LENGTH
from lightning_eff.functional.numerics.float_format import ROUNDING, FloatRounding
from lightning_eff.functional.numerics.fp8 import HISTORY, MARGIN
from lightning_eff.functional.numerics.luq import LEVELS, MOMENTUM, SAMPLES, GradientRounding
from lightning_eff.functional.numerics.luq import ROUNDING as GRADIENT_ROUNDING
from lightning_eff.functional.numerics.sawb import UNSIGNED, Unsigned
from lightning_eff.kernels.fp8 import ALIGNMENT
from lightning_eff.methods import METHODS
from lightning_eff.precision.formats.base import Format
from lightning_eff.precision.formats.bf16 import BF16Format
from lightning_eff.precision.formats.fitted import FittedFormatOfLayer, FittedScale
from lightning_eff.precision.formats.fp8 import FP8Format, RowwiseFP8Format
from lightning_eff.precision.formats.luq import LUQFormat
from lightning_eff.precision.formats.shared_exponent import AgreedAutoflex, DFP16Format, FlexpointFormat

Products = Literal["auto", "native", "emulated"]
OnNonFinite = Literal["raise", "warn"]
Scaling = Literal["tensorwise", "rowwise", "delayed"]
SLOW_FEATURES, SLOW_CHANNELS = 64, 16
"""Linear layers (``python -m benchmarks.layers``) and convolutions up to this size are not clearly faster on a CPU."""
MasterWeights = Literal["float32", "flex16"]


def options_from(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's ``locals()`` as the options it was given."""
    return {key: value for key, value in arguments.items() if key not in ("self", "__class__")}


def variant_of(plugin: Any, option: str, given: Any, variants: Mapping[Any, str]) -> Any:
    """Which variant of a family of methods ``plugin`` is; sets ``plugin.eff_method`` and ``plugin.info``.

    Args:
        plugin: an instance whose string, if it was made from one, is ``plugin.eff_method``.
        option: name of the option that tells the variants apart.
        given: its value, None where it was left out.
        variants: value -> string; the first is the default.

    Raises:
        ConfigurationError: ``given`` is not known, or it contradicts the string.
    """
    asked = plugin.__dict__.get("eff_method")
    named = next((value for value, name in variants.items() if name == asked), next(iter(variants)))
    value = named if given is None else check(option, given, Choice(*variants))
    if asked is not None and variants[value] != asked:
        raise ConfigurationError(
            f"{asked!r} was asked for with {option}={given!r}. Ask for {variants[value]!r}, or leave it out."
        )
    plugin.eff_method = variants[value]
    plugin.info = METHODS[plugin.eff_method]
    return value


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Options every method with converted layers has.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    exempt: tuple[str, ...] = ()
    exempt_first_last: bool = True
    pack_relu: bool = True
    products: Products = "auto"
    measure_every_n_steps: int = 1000
    on_nonfinite: OnNonFinite = "raise"

    RULES: ClassVar[Mapping[str, Rule]] = {
        "exempt": Names(),
        "exempt_first_last": YesNo(),
        "pack_relu": YesNo(),
        "products": Choice(*get_args(Products)),
        "measure_every_n_steps": Whole(),
        "on_nonfinite": ON_NONFINITE,
    }
    """What each option may be."""

    def __post_init__(self) -> None:
        for name, value in checked(self.RULES, self.__dict__).items():
            object.__setattr__(self, name, value)

    def format(self) -> Format:
        """The format these options ask for."""
        raise TypeError(f"{type(self).__name__} names no format")

    def too_slow(self, shape: Sequence[int], device: torch.device) -> str:
        """Why a layer with a weight of this shape is left alone on ``device``, to say to people; mostly empty."""
        return ""


@dataclass(frozen=True, kw_only=True)
class LUQConfig(LayerConfig):
    """Options of ``luq4``; see :class:`lightning_eff.precision.luq.LUQMixin` for their meaning.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    levels: int = 7
    samples: int = 1
    unsigned: Unsigned = "mirror5"
    hindsight: float | None = None
    power_of_two: bool = False
    gradient_rounding: GradientRounding = "luq"

    RULES: ClassVar[Mapping[str, Rule]] = {
        **LayerConfig.RULES,
        "levels": LEVELS,
        "samples": SAMPLES,
        "unsigned": UNSIGNED,
        "hindsight": Maybe(MOMENTUM),
        "power_of_two": YesNo(),
        "gradient_rounding": GRADIENT_ROUNDING,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.products == "native" and self.levels > 7:
            raise ConfigurationError("levels=8 has the code 128, beyond int8: use products='auto' or levels=7.")

    def format(self) -> Format:
        """INT4 and FP4."""
        return LUQFormat(self)


@dataclass(frozen=True, kw_only=True)
class FP8Config(LayerConfig):
    """Options of ``fp8``; see :class:`lightning_eff.precision.fp8.FP8Mixin` for their meaning.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    scaling: Scaling = "tensorwise"
    power_of_two: bool | None = None
    history: int = 1024
    margin: int = 0
    filter_slow: bool = True

    RULES: ClassVar[Mapping[str, Rule]] = {
        **LayerConfig.RULES,
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
        """E4M3 and E5M2."""
        return RowwiseFP8Format(self) if self.scaling == "rowwise" else FP8Format(self)

    def too_slow(self, shape: Sequence[int], device: torch.device) -> str:
        """The sizes not clearly faster than float32 at any batch size (CPU); those torchao leaves out (CUDA)."""
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


@dataclass(frozen=True, kw_only=True)
class BF16EmulatedConfig(LayerConfig):
    """Options of ``bf16-emulated``: those of every method with converted layers."""

    exempt_first_last: bool = False

    def format(self) -> Format:
        """bfloat16."""
        return BF16Format(self)


@dataclass(frozen=True, kw_only=True)
class IntegerConfig(LayerConfig):
    """Options of ``dfp16``: those of every method with converted layers."""

    exempt_first_last: bool = False

    def format(self) -> Format:
        """int16 with a measured exponent."""
        return DFP16Format(self)


@dataclass(frozen=True, kw_only=True)
class FlexpointConfig(IntegerConfig):
    """Options of ``flexpoint16``; see :class:`lightning_eff.precision.flexpoint.FlexpointMixin` for their meaning.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    alpha: float = 2.0
    beta: float = 3.0
    gamma: float = 100.0
    length: int = 16
    store_results: bool = True
    weights: MasterWeights = "float32"
    weight_rounding: FloatRounding = "nearest"

    RULES: ClassVar[Mapping[str, Rule]] = {
        **IntegerConfig.RULES,
        "alpha": ALPHA,
        "beta": BETA,
        "gamma": GAMMA,
        "length": LENGTH,
        "store_results": YesNo(),
        "weights": Choice(*get_args(MasterWeights)),
        "weight_rounding": ROUNDING,
    }

    def autoflex(self) -> AgreedAutoflex:
        """The exponent management of a new tensor."""
        return AgreedAutoflex(alpha=self.alpha, beta=self.beta, gamma=self.gamma, length=self.length)

    def format(self) -> Format:
        """int16 with a predicted exponent."""
        return FlexpointFormat(self)


@dataclass(frozen=True, kw_only=True)
class FittedConfig(LayerConfig):
    """Options of ``fp8-fit`` and ``fp6-fit``; see :class:`lightning_eff.precision.fitted.FittedMixin`.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    bits: int = 8
    refit_every_n_steps: int = 100
    scale: FittedScale = "max"
    gradient_rounding: FloatRounding = "nearest"

    RULES: ClassVar[Mapping[str, Rule]] = {
        **LayerConfig.RULES,
        "bits": Choice(8, 6),
        "refit_every_n_steps": Whole(1),
        "scale": Choice(*get_args(FittedScale)),
        "gradient_rounding": ROUNDING,
    }

    def format(self) -> Format:
        """A float format for each layer's gradient."""
        return FittedFormatOfLayer(self)
