"""Rows of the precision methods."""

from __future__ import annotations

from types import MappingProxyType

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
        class_name="LUQPrecision",
        shell="lightning_eff.precision.luq:LUQMixin",
        summary="4-bit training: INT4 weights and activations, logarithmic unbiased FP4 gradients.",
        paper=(
            "Chmiel, Banner, Hoffer, Ben-Yaacov, Soudry: Accurate Neural Training with 4-bit Matrix "
            "Multiplications at Standard Formats. ICLR 2023. https://arxiv.org/abs/2112.10769"
        ),
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
        class_name="FP8Precision",
        shell="lightning_eff.precision.fp8:FP8Mixin",
        summary="8-bit floating point: E4M3 inputs and weights, E5M2 gradients, one dynamic scale per tensor.",
        paper=("Micikevicius et al.: FP8 Formats for Deep Learning. 2022. https://arxiv.org/abs/2209.05433"),
        composes_with=("32-true", "bf16-mixed", "bf16-true"),
        strategies=_SHARDED,
        conflicts=_QUANTIZED_CONFLICTS,
        state=phase_and(),
        metrics=_figures("fp8", "E4M3", top="E5M2"),
    ),
    MethodInfo(
        name="fp8-rowwise",
        kind="precision",
        class_name="FP8Precision",
        shell="lightning_eff.precision.fp8:FP8Mixin",
        summary="8-bit floating point: E4M3 everywhere, a dynamic scale for each row of a product.",
        paper=("Micikevicius et al.: FP8 Formats for Deep Learning. 2022. https://arxiv.org/abs/2209.05433"),
        composes_with=("32-true", "bf16-mixed", "bf16-true"),
        strategies=_SHARDED,
        conflicts=_QUANTIZED_CONFLICTS,
        state=phase_and(),
        metrics=_figures("fp8-rowwise", "E4M3", top="E4M3"),
    ),
    MethodInfo(
        name="fp8-delayed",
        kind="precision",
        class_name="FP8Precision",
        shell="lightning_eff.precision.fp8:FP8Mixin",
        summary="8-bit floating point: E4M3 and E5M2, scales from the largest magnitudes of the steps before.",
        paper=("Micikevicius et al.: FP8 Formats for Deep Learning. 2022. https://arxiv.org/abs/2209.05433"),
        composes_with=("32-true", "bf16-mixed", "bf16-true"),
        strategies=_SHARDED,
        conflicts=_QUANTIZED_CONFLICTS,
        state=phase_and(memory=memory(DELAYED), optional={"memory": {}}),
        metrics=_figures("fp8-delayed", "E4M3", top="E5M2"),
    ),
    MethodInfo(
        name="fp8-fit",
        kind="precision",
        class_name="FittedPrecision",
        shell="lightning_eff.precision.fitted:FittedMixin",
        summary="8-bit training: E4M3 inputs and weights, gradients in the float format that suits each layer.",
        paper=(
            "Chmiel, Ben-Uri, Shkolnik, Hoffer, Banner, Soudry: Neural gradients are near-lognormal: improved "
            "quantized and sparse training. ICLR 2021. https://arxiv.org/abs/2006.08173"
        ),
        composes_with=("32-true", "bf16-mixed", "bf16-true"),
        strategies=_SHARDED,
        conflicts=_QUANTIZED_CONFLICTS,
        state=phase_and(stream=True, memory=memory(fitted_format(8))),
        metrics=_figures("fp8-fit", "E4M3", top="the format"),
    ),
    MethodInfo(
        name="fp6-fit",
        kind="precision",
        class_name="FittedPrecision",
        shell="lightning_eff.precision.fitted:FittedMixin",
        summary="6-bit training: E2M3 inputs and weights, gradients in the float format that suits each layer.",
        paper=(
            "Chmiel, Ben-Uri, Shkolnik, Hoffer, Banner, Soudry: Neural gradients are near-lognormal: improved "
            "quantized and sparse training. ICLR 2021. https://arxiv.org/abs/2006.08173"
        ),
        composes_with=("32-true", "bf16-mixed", "bf16-true"),
        strategies=_SHARDED,
        conflicts=_QUANTIZED_CONFLICTS,
        state=phase_and(stream=True, memory=memory(fitted_format(6))),
        metrics=_figures("fp6-fit", "E2M3", top="the format"),
    ),
    MethodInfo(
        name="flexpoint16",
        kind="precision",
        class_name="FlexpointPrecision",
        shell="lightning_eff.precision.flexpoint:FlexpointMixin",
        summary="int16 tensors with one exponent each, predicted by Autoflex from the steps before.",
        paper=(
            "Koester, Webb, Wang, Nassar, Bansal, Constable, Elibol, Gray, Hall, Hornof, Khosrowshahi, Kloss, "
            "Pai, Rao: Flexpoint: An Adaptive Numerical Format for Efficient Training of Deep Neural "
            "Networks. NIPS 2017. https://arxiv.org/abs/1711.02213"
        ),
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
        class_name="DFP16Precision",
        shell="lightning_eff.precision.dfp16:DFP16Mixin",
        summary="int16 tensors with one exponent each, measured; integer products that cannot overflow.",
        paper=(
            "Das et al.: Mixed Precision Training of Convolutional Neural Networks using Integer Operations. "
            "ICLR 2018. https://arxiv.org/abs/1802.00930"
        ),
        composes_with=("32-true",),
        strategies=_SHARDED,
        conflicts=_FLOAT32_CONFLICTS,
        state=phase_and(),
        metrics=_figures("dfp16", "int16", top="the range"),
    ),
    MethodInfo(
        name="bf16-emulated",
        kind="precision",
        class_name="BF16EmulatedPrecision",
        shell="lightning_eff.precision.bf16_emulated:BF16EmulatedMixin",
        summary="The bfloat16 study's recipe on any hardware: bfloat16 products, float32 everything else.",
        paper=(
            "Kalamkar et al.: A Study of BFLOAT16 for Deep Learning Training. 2019. https://arxiv.org/abs/1905.12322"
        ),
        composes_with=("32-true",),
        strategies=_SHARDED,
        conflicts=_FLOAT32_CONFLICTS,
        state=phase_and(),
        metrics=_figures("bf16-emulated", "bfloat16"),
    ),
    MethodInfo(
        name="bf16-sr",
        kind="precision",
        class_name="BF16Precision",
        shell="lightning_eff.precision.bf16:BF16Mixin",
        summary="bfloat16 weights, updated by any optimizer with stochastic rounding; nothing more is kept.",
        paper=("Zamirai, Zhang, Aberger, De Sa: Revisiting BFloat16 Training. 2020. https://arxiv.org/abs/2010.06192"),
        composes_with=("bf16-true",),
        strategies=("single_device", "ddp"),
        conflicts=_BF16_CONFLICTS,
        state=Record({"bf16": UPDATES}),
    ),
    MethodInfo(
        name="bf16-kahan",
        kind="precision",
        class_name="BF16Precision",
        shell="lightning_eff.precision.bf16:BF16Mixin",
        summary="bfloat16 weights, updated by any optimizer with Kahan compensation; 2 bytes more per weight.",
        paper=("Zamirai, Zhang, Aberger, De Sa: Revisiting BFloat16 Training. 2020. https://arxiv.org/abs/2010.06192"),
        composes_with=("bf16-true",),
        strategies=("single_device", "ddp"),
        conflicts=_BF16_CONFLICTS,
        state=Record({"compensation": TensorOf("bfloat16"), "bf16": UPDATES}),
    ),
    MethodInfo(
        name="bf16-split",
        kind="precision",
        class_name="BF16Precision",
        shell="lightning_eff.precision.bf16:BF16Mixin",
        summary="bfloat16 weights, the missing 16 bits beside the optimizer: float32 updates in 4 bytes.",
        paper=(
            "Kalamkar et al.: Optimizing Deep Learning Recommender Systems Training on CPU Cluster "
            "Architectures (Split-SGD). SC 2020. https://arxiv.org/abs/2005.04680"
        ),
        composes_with=("bf16-true",),
        strategies=("single_device", "ddp"),
        conflicts=_BF16_CONFLICTS,
        state=Record({"lo": TensorOf("int16"), "bf16": UPDATES}),
    ),
)
