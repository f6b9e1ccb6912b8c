"""Rows of the precision methods."""

from __future__ import annotations

from types import MappingProxyType

from lightning_eff.methods import papers
from lightning_eff.methods.info import MethodInfo
from lightning_eff.methods.state import (
    AUTOFLEX,
    DELAYED,
    HINDSIGHT,
    UPDATES,
    Record,
    Table,
    TensorOf,
    fitted_format,
    memory,
    phase_and,
)

_QUANTIZED_CONFLICTS = MappingProxyType(
    {
        "16-mixed": "the fp16 loss scaler hides non-finite gradients from the quantiser; use bf16-mixed",
        "16-true": "fp16 gradients underflow before they are quantised; use bf16-true",
        "fsdp": "FSDP1 is not shown to work; FSDP2 is: ModelParallelStrategy(data_parallel_size=<ranks>, "
        "tensor_parallel_size=1) and fully_shard in configure_model",
        "model_parallel": "tensor parallelism splits the layers that are converted; for FSDP2 write "
        "ModelParallelStrategy(data_parallel_size=<ranks>, tensor_parallel_size=1)",
        "fabric_deepspeed": "Fabric steps the optimizer past DeepSpeed's engine, which changes the numbers of plain "
        "training too (lightning 2.6, deepspeed 0.19); use Trainer",
    }
)
_FLOAT32_CONFLICTS = MappingProxyType(
    {
        **_QUANTIZED_CONFLICTS,
        "bf16-mixed": "what lies between the products would have fewer bits than they have; use 32-true",
        "bf16-true": "what lies between the products would have fewer bits than they have; use 32-true",
    }
)
_SHARDED = ("single_device", "ddp", "fsdp2", "deepspeed")
_BF16_CONFLICTS = MappingProxyType(
    {
        "32-true": "float32 weights lose no update; nothing is left to do",
        "bf16-mixed": "its weights are float32 and lose no update; nothing is left to do",
        "16-mixed": "its weights are float32 and lose no update; nothing is left to do",
        "16-true": "the weights must be bfloat16; use bf16-true",
        "fsdp": "not shown to work yet; use strategy='ddp'",
        "fsdp2": "its updates are made for whole parameters, not for shards; use strategy='ddp'",
        "deepspeed": "it has optimizers of its own; use strategy='ddp'",
    }
)


def _figures(name: str, operand: str, top: str = "") -> dict[str, str]:
    """The metrics of a method with 8 or 16 bits; ``top`` is what gradients saturate at, if they do."""
    found = {
        f"eff/{name}/weight_sqnr_db": f"signal to quantisation noise of the {operand} weights, dB, mean over layers",
        f"eff/{name}/input_sqnr_db": f"signal to quantisation noise of the {operand} inputs, dB, mean over layers",
        f"eff/{name}/grad_underflow": "share of gradient elements that became zero, mean over layers",
    }
    saturated = {f"eff/{name}/grad_saturated": f"share of gradient values at the top of {top}, mean over layers"}
    return {**found, **saturated} if top else found


ROWS = (
    MethodInfo(
        name="luq4",
        kind="precision",
        family="numerics",
        class_name="LUQPrecision",
        mixin="lightning_eff.precision.luq:LUQMixin",
        summary="4-bit training: INT4 weights and activations, logarithmic unbiased FP4 gradients.",
        paper=papers.LUQ,
        composes_with=("32-true", "bf16-mixed", "bf16-true"),
        strategies=_SHARDED,
        conflicts=_QUANTIZED_CONFLICTS,
        state=phase_and(stream=True, memory=memory(HINDSIGHT)),
        metrics={
            "eff/luq4/weight_sqnr_db": "signal to quantisation noise of the INT4 weights, dB, mean over layers",
            "eff/luq4/input_sqnr_db": "signal to quantisation noise of the INT4 inputs, dB, mean over layers",
            "eff/luq4/grad_zeros": "share of FP4 gradient codes that are zero, mean over layers",
            "eff/luq4/grad_saturated": "share of FP4 gradient codes at the top level, mean over layers",
        },
    ),
    MethodInfo(
        name="fp8",
        kind="precision",
        family="numerics",
        class_name="FP8Precision",
        mixin="lightning_eff.precision.fp8:FP8Mixin",
        options={"scaling": "tensorwise"},
        summary="8-bit floating point: E4M3 inputs and weights, E5M2 gradients, one dynamic scale per tensor.",
        paper=papers.FP8,
        composes_with=("32-true", "bf16-mixed", "bf16-true"),
        strategies=_SHARDED,
        conflicts=_QUANTIZED_CONFLICTS,
        state=phase_and(),
        metrics=_figures("fp8", "E4M3", top="E5M2"),
    ),
    MethodInfo(
        name="fp8-rowwise",
        kind="precision",
        family="numerics",
        class_name="FP8Precision",
        mixin="lightning_eff.precision.fp8:FP8Mixin",
        options={"scaling": "rowwise"},
        summary="8-bit floating point: E4M3 everywhere, a dynamic scale for each row of a product.",
        paper=papers.FP8,
        composes_with=("32-true", "bf16-mixed", "bf16-true"),
        strategies=_SHARDED,
        conflicts=_QUANTIZED_CONFLICTS,
        state=phase_and(),
        metrics=_figures("fp8-rowwise", "E4M3", top="E4M3"),
    ),
    MethodInfo(
        name="fp8-delayed",
        kind="precision",
        family="numerics",
        class_name="FP8Precision",
        mixin="lightning_eff.precision.fp8:FP8Mixin",
        options={"scaling": "delayed"},
        summary="8-bit floating point: E4M3 and E5M2, scales from the largest magnitudes of the steps before.",
        paper=papers.FP8,
        composes_with=("32-true", "bf16-mixed", "bf16-true"),
        strategies=_SHARDED,
        conflicts=_QUANTIZED_CONFLICTS,
        state=phase_and(memory=memory(DELAYED), optional={"memory": {}}),
        metrics=_figures("fp8-delayed", "E4M3", top="E5M2"),
    ),
    MethodInfo(
        name="fp8-fit",
        kind="precision",
        family="numerics",
        class_name="FittedPrecision",
        mixin="lightning_eff.precision.fitted:FittedMixin",
        options={"bits": 8},
        summary="8-bit training: E4M3 inputs and weights, gradients in the float format that suits each layer.",
        paper=papers.NEAR_LOGNORMAL,
        composes_with=("32-true", "bf16-mixed", "bf16-true"),
        strategies=_SHARDED,
        conflicts=_QUANTIZED_CONFLICTS,
        state=phase_and(stream=True, memory=memory(fitted_format(8))),
        metrics=_figures("fp8-fit", "E4M3", top="the format"),
    ),
    MethodInfo(
        name="fp6-fit",
        kind="precision",
        family="numerics",
        class_name="FittedPrecision",
        mixin="lightning_eff.precision.fitted:FittedMixin",
        options={"bits": 6},
        summary="6-bit training: E2M3 inputs and weights, gradients in the float format that suits each layer.",
        paper=papers.NEAR_LOGNORMAL,
        composes_with=("32-true", "bf16-mixed", "bf16-true"),
        strategies=_SHARDED,
        conflicts=_QUANTIZED_CONFLICTS,
        state=phase_and(stream=True, memory=memory(fitted_format(6))),
        metrics=_figures("fp6-fit", "E2M3", top="the format"),
    ),
    MethodInfo(
        name="flexpoint16",
        kind="precision",
        family="numerics",
        class_name="FlexpointPrecision",
        mixin="lightning_eff.precision.flexpoint:FlexpointMixin",
        summary="int16 tensors with one exponent each, predicted by Autoflex from the steps before.",
        paper=papers.FLEXPOINT,
        composes_with=("32-true",),
        strategies=("single_device", "ddp"),
        conflicts={
            **_FLOAT32_CONFLICTS,
            "fsdp2": "it rounds whole weights after each step, and ranks hold shards; use strategy='ddp'",
            "deepspeed": "it rounds whole weights after each step, and ZeRO keeps its own; use strategy='ddp'",
        },
        state=phase_and(
            stream=True,
            memory=memory(AUTOFLEX),
            weights=Record({"memory": Table(AUTOFLEX), "scales": Table(AUTOFLEX.keys["scale"])}),
        ),
        metrics={
            **_figures("flexpoint16", "int16", top="the range"),
            "eff/flexpoint16/overflows": "writes so far that did not fit their exponent, mean over layers",
        },
    ),
    MethodInfo(
        name="dfp16",
        kind="precision",
        family="numerics",
        class_name="DFP16Precision",
        mixin="lightning_eff.precision.dfp16:DFP16Mixin",
        summary="int16 tensors with one exponent each, measured; integer products that cannot overflow.",
        paper=papers.DFP16,
        composes_with=("32-true",),
        strategies=_SHARDED,
        conflicts=_FLOAT32_CONFLICTS,
        state=phase_and(),
        metrics=_figures("dfp16", "int16", top="the range"),
    ),
    MethodInfo(
        name="bf16-emulated",
        kind="precision",
        family="numerics",
        class_name="BF16EmulatedPrecision",
        mixin="lightning_eff.precision.bf16_emulated:BF16EmulatedMixin",
        summary="The bfloat16 study's recipe on any hardware: bfloat16 products, float32 everything else.",
        paper=papers.BFLOAT16_STUDY,
        composes_with=("32-true",),
        strategies=_SHARDED,
        conflicts=_FLOAT32_CONFLICTS,
        state=phase_and(),
        metrics=_figures("bf16-emulated", "bfloat16"),
    ),
    MethodInfo(
        name="bf16-sr",
        kind="precision",
        family="numerics",
        class_name="BF16Precision",
        mixin="lightning_eff.precision.bf16:BF16Mixin",
        options={"update": "sr"},
        summary="bfloat16 weights, updated by any optimizer with stochastic rounding; nothing more is kept.",
        paper=papers.REVISITING_BFLOAT16,
        composes_with=("bf16-true",),
        strategies=("single_device", "ddp"),
        conflicts=_BF16_CONFLICTS,
        state=Record({"bf16": UPDATES}),
    ),
    MethodInfo(
        name="bf16-kahan",
        kind="precision",
        family="numerics",
        class_name="BF16Precision",
        mixin="lightning_eff.precision.bf16:BF16Mixin",
        options={"update": "kahan"},
        summary="bfloat16 weights, updated by any optimizer with Kahan compensation; 2 bytes more per weight.",
        paper=papers.REVISITING_BFLOAT16,
        composes_with=("bf16-true",),
        strategies=("single_device", "ddp"),
        conflicts=_BF16_CONFLICTS,
        state=Record({"compensation": TensorOf("bfloat16"), "bf16": UPDATES}),
    ),
    MethodInfo(
        name="bf16-split",
        kind="precision",
        family="numerics",
        class_name="BF16Precision",
        mixin="lightning_eff.precision.bf16:BF16Mixin",
        options={"update": "split"},
        summary="bfloat16 weights, the missing 16 bits beside the optimizer: float32 updates in 4 bytes.",
        paper=papers.SPLIT_SGD,
        composes_with=("bf16-true",),
        strategies=("single_device", "ddp"),
        conflicts=_BF16_CONFLICTS,
        state=Record({"lo": TensorOf("int16"), "bf16": UPDATES}),
    ),
)
