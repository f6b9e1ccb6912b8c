"""The mathematics of every method: tensors in, tensors out. Reads like the papers; imports no Lightning."""

from lightning_eff.functional.codes import Codes, pack_int4, unpack_int4
from lightning_eff.functional.numerics.bf16 import bf16_round, bf16_stochastic_round, join_fp32, kahan_step, split_fp32
from lightning_eff.functional.numerics.fp8 import DelayedScale, fp8_codes, fp8_quantize, fp8_scale
from lightning_eff.functional.numerics.luq import (
    GRADIENT_ROUNDINGS,
    HindsightMax,
    fnt_learning_rate,
    luq_codes,
    luq_quantize,
    luq_scale,
    smp_quantize,
)
from lightning_eff.functional.numerics.sawb import sawb_codes, sawb_quantize, sawb_scale
from lightning_eff.functional.random import draw_seed, uniform_bits
from lightning_eff.functional.statistics import saturated_share, sqnr_db, zero_share

__all__ = [
    "GRADIENT_ROUNDINGS",
    "Codes",
    "DelayedScale",
    "HindsightMax",
    "bf16_round",
    "bf16_stochastic_round",
    "draw_seed",
    "fnt_learning_rate",
    "fp8_codes",
    "fp8_quantize",
    "fp8_scale",
    "join_fp32",
    "kahan_step",
    "luq_codes",
    "luq_quantize",
    "luq_scale",
    "pack_int4",
    "saturated_share",
    "sawb_codes",
    "sawb_quantize",
    "sawb_scale",
    "smp_quantize",
    "split_fp32",
    "sqnr_db",
    "uniform_bits",
    "unpack_int4",
    "zero_share",
]
