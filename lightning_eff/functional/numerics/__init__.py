"""Number formats and what rounding to them does: values or integer codes of a tensor, the scale, the error.

luq             FP4 gradients, logarithmic and unbiased
sawb            INT4 inputs and weights
fp8             E4M3 and E5M2 with a scale per tensor or per row
float_format    any float of up to eight bits
flexpoint       16-bit integers with a shared exponent that is predicted
dfp16           16-bit integers with a shared exponent that is measured
bf16            bfloat16 weights whose small updates are not lost
lognormal       float formats and pruning fitted to the distribution of gradients
"""

from lightning_eff.functional.numerics.bf16 import bf16_round, bf16_stochastic_round, join_fp32, kahan_step, split_fp32
from lightning_eff.functional.numerics.dfp16 import (
    dfp_add,
    dfp_codes,
    dfp_downconvert,
    dfp_product,
    dfp_quantize,
    dfp_scale,
    int32_overflows,
)
from lightning_eff.functional.numerics.flexpoint import (
    Autoflex,
    autoflex_init,
    autoflex_round,
    check_integer_format,
    flex_codes,
    flex_quantize,
    integer_codes,
    predicted_max,
    round_to_scale,
)
from lightning_eff.functional.numerics.float_format import (
    E4M3,
    E5M2,
    FloatFormat,
    check_choices,
    decode,
    encode,
    quantize,
    unencodable,
)
from lightning_eff.functional.numerics.fp8 import (
    FP8_E4M3,
    FP8_E5M2,
    DelayedScale,
    fp8_codes,
    fp8_quantize,
    fp8_scale,
    largest_along,
)
from lightning_eff.functional.numerics.lognormal import (
    FittedFormat,
    LognormalFit,
    best_format,
    cosine_similarity_of,
    lognormal_fit,
    relative_error,
    remaining_sparsity,
    sparsity_of,
    stochastic_prune,
    threshold_for,
    threshold_of,
)
from lightning_eff.functional.numerics.luq import (
    GRADIENT_ROUNDINGS,
    HindsightMax,
    fnt_learning_rate,
    luq_codes,
    luq_quantize,
    luq_scale,
    round_to_powers,
    smp_quantize,
)
from lightning_eff.functional.numerics.sawb import sawb_codes, sawb_quantize, sawb_scale

__all__ = [
    "E4M3",
    "E5M2",
    "FP8_E4M3",
    "FP8_E5M2",
    "GRADIENT_ROUNDINGS",
    "Autoflex",
    "DelayedScale",
    "FittedFormat",
    "FloatFormat",
    "HindsightMax",
    "LognormalFit",
    "autoflex_init",
    "autoflex_round",
    "best_format",
    "bf16_round",
    "bf16_stochastic_round",
    "check_choices",
    "check_integer_format",
    "cosine_similarity_of",
    "decode",
    "dfp_add",
    "dfp_codes",
    "dfp_downconvert",
    "dfp_product",
    "dfp_quantize",
    "dfp_scale",
    "encode",
    "flex_codes",
    "flex_quantize",
    "fnt_learning_rate",
    "fp8_codes",
    "fp8_quantize",
    "fp8_scale",
    "int32_overflows",
    "integer_codes",
    "join_fp32",
    "kahan_step",
    "largest_along",
    "lognormal_fit",
    "luq_codes",
    "luq_quantize",
    "luq_scale",
    "predicted_max",
    "quantize",
    "relative_error",
    "remaining_sparsity",
    "round_to_powers",
    "round_to_scale",
    "sawb_codes",
    "sawb_quantize",
    "sawb_scale",
    "smp_quantize",
    "sparsity_of",
    "split_fp32",
    "stochastic_prune",
    "threshold_for",
    "threshold_of",
    "unencodable",
]
