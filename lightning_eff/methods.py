"""One row per method: what is said about a method more than once is said here.

The registry of strings, the compatibility check, ``python -m lightning_eff explain``, the documentation table and
the test battery all read these rows. This module imports nothing but the standard library.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["METHODS", "MethodInfo"]


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """What is known about one method before any of its code is imported.

    Attributes:
        name: the string a user writes, lower case.
        kind: where the string goes: ``Trainer(precision=...)``, ``Trainer(strategy=...)`` or a callback.
        class_name: the public class, found in ``lightning_eff.<kind>`` and ``lightning_eff.pytorch_lightning``.
        shell: ``"module:Mixin"`` of the Lightning-free mixin the public classes are made from.
        summary: one sentence for people.
        paper: authors, title, venue, year, address.
        composes_with: Lightning precisions allowed after ``+`` (``"luq4+bf16-mixed"``); the first is the default.
        strategies: strategy families the method has been shown to work with.
        conflicts: what is refused, with the reason.
        state_keys: keys the method adds to its part of a checkpoint.
        metrics: logged key -> meaning and unit.
    """

    name: str
    kind: Literal["precision", "strategy", "callback"]
    class_name: str
    shell: str
    summary: str
    paper: str
    composes_with: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    conflicts: Mapping[str, str] = field(default_factory=dict)
    state_keys: tuple[str, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict)

    def load_shell(self) -> type[Any]:
        """Import and return the mixin class."""
        module, _, attribute = self.shell.partition(":")
        shell: type[Any] = getattr(importlib.import_module(module), attribute)
        return shell

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: a plugin that is sent to another process finds the row there."""
        return _row, (self.name,)

    @property
    def strings(self) -> tuple[str, ...]:
        """Every string a user may write for this method.

        Example:
            >>> METHODS["luq4"].strings[:2]
            ('luq4', 'luq4+32-true')
        """
        return (self.name, *(f"{self.name}+{other}" for other in self.composes_with))


def _row(name: str) -> MethodInfo:
    return METHODS[name]


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


METHODS: Mapping[str, MethodInfo] = MappingProxyType(
    {
        info.name: info
        for info in (
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
                state_keys=("seed", "calls", "phase", "memory"),
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
                state_keys=("phase",),
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
                state_keys=("phase",),
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
                state_keys=("phase", "memory"),
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
                state_keys=("seed", "calls", "phase", "memory"),
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
                state_keys=("seed", "calls", "phase", "memory"),
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
                state_keys=("seed", "calls", "phase", "memory", "weights"),
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
                state_keys=("phase",),
                metrics=_figures("dfp16", "int16", top="the range"),
            ),
            MethodInfo(
                name="bf16-emulated",
                kind="precision",
                class_name="BF16EmulatedPrecision",
                shell="lightning_eff.precision.bf16_emulated:BF16EmulatedMixin",
                summary="The bfloat16 study's recipe on any hardware: bfloat16 products, float32 everything else.",
                paper=(
                    "Kalamkar et al.: A Study of BFLOAT16 for Deep Learning Training. 2019. "
                    "https://arxiv.org/abs/1905.12322"
                ),
                composes_with=("32-true",),
                strategies=_SHARDED,
                conflicts=_FLOAT32_CONFLICTS,
                state_keys=("phase",),
                metrics=_figures("bf16-emulated", "bfloat16"),
            ),
            MethodInfo(
                name="dropcompute",
                kind="strategy",
                class_name="DropComputeStrategy",
                shell="lightning_eff.strategies.dropcompute:DropComputeMixin",
                summary="Data parallelism that does not wait for stragglers: late ranks drop micro-batches.",
                paper=(
                    "Giladi, Gottlieb, Shkolnik, Karnieli, Banner, Hoffer, Levy, Soudry: DropCompute: simple and more "
                    "robust distributed synchronous training via compute variance reduction. NeurIPS 2023. "
                    "https://arxiv.org/abs/2306.10598"
                ),
                conflicts={
                    "sync_batchnorm": "its forward pass waits for ranks that may have dropped the micro-batch",
                    "manual_optimization": "it has to know where an optimizer step begins and ends",
                },
                state_keys=("threshold_s", "steps", "computed", "dropped"),
                metrics={
                    "eff/dropcompute/threshold_s": "compute threshold, seconds",
                    "eff/dropcompute/drop_rate": "share of micro-batches dropped since the last record, all ranks",
                    "eff/dropcompute/step_time_s": "mean wall time of a step since the last record, seconds",
                    "eff/dropcompute/speedup_estimate": "computed samples per second, relative to waiting (estimate)",
                },
            ),
            MethodInfo(
                name="pipelined_bp",
                kind="strategy",
                class_name="PipelinedBPStrategy",
                shell="lightning_eff.strategies.pipelined_bp:PipelinedBPMixin",
                summary="Pipeline parallelism without bubble: stages update at once and allow for late gradients.",
                paper=(
                    "Kosson, Chiley, Venigalla, Hestness, Köster: Pipelined backpropagation at scale: training large "
                    "models without batches. MLSys 2021. https://arxiv.org/abs/2003.11666"
                ),
                conflicts={
                    "manual_optimization": "it runs forward, backward and step by itself",
                    "accumulate_grad_batches": "every micro-batch is an update",
                    "16-mixed": "its loss scaler would have to agree over stages that are at different samples",
                },
                state_keys=("samples", "seed", "in_flight", "layers", "starts", "stages"),
                metrics={
                    "eff/pipelined_bp/utilisation": "share of the time in which stages computed, mean over the stages",
                    "eff/pipelined_bp/bubble_fraction": "the rest of it: waiting, sending, loading, hooks",
                    "eff/pipelined_bp/transfer_s": "seconds per micro-batch of sending that computation does not hide",
                    "eff/pipelined_bp/staleness": "updates between forward and backward of a sample, first stage, mean",
                },
            ),
            MethodInfo(
                name="gradient_pruning",
                kind="callback",
                class_name="GradientPruning",
                shell="lightning_eff.callbacks.gradient_pruning:GradientPruningMixin",
                summary="Unbiased pruning of the gradients at layer outputs to a set share of zeros.",
                paper=(
                    "Chmiel, Ben-Uri, Shkolnik, Hoffer, Banner, Soudry: Neural gradients are near-lognormal: improved "
                    "quantized and sparse training. ICLR 2021. https://arxiv.org/abs/2006.08173"
                ),
                strategies=("single_device", "ddp"),
                conflicts={
                    "16-mixed": "the loss scale changes between two fits and the threshold with it; use bf16-mixed",
                    "fsdp": "not shown to work yet; use strategy='ddp'",
                    "deepspeed": "not shown to work yet; use strategy='ddp'",
                },
                state_keys=("seed", "ranks"),
                metrics={
                    "eff/gradient_pruning/sparsity": "share of zeros in the pruned gradients, over all layers",
                    "eff/gradient_pruning/sigma_log2": "deviation of log2|g| at the last fit, octaves, mean of layers",
                },
            ),
            MethodInfo(
                name="gradient_statistics",
                kind="callback",
                class_name="GradientStatistics",
                shell="lightning_eff.callbacks.gradient_statistics:GradientStatisticsMixin",
                summary="Measures how wide neural gradients are and recommends a float format for each layer.",
                paper=(
                    "Chmiel, Ben-Uri, Shkolnik, Hoffer, Banner, Soudry: Neural gradients are near-lognormal: improved "
                    "quantized and sparse training. ICLR 2021. https://arxiv.org/abs/2006.08173"
                ),
                strategies=("single_device", "ddp"),
                conflicts={
                    "fsdp": "not shown to work yet; use strategy='ddp'",
                    "deepspeed": "not shown to work yet; use strategy='ddp'",
                },
                state_keys=("layers",),
                metrics={
                    "eff/gradient_statistics/sigma_log2": "deviation of log2|g|, octaves, mean over layers",
                    "eff/gradient_statistics/zeros": "share of gradient elements that are zero, mean over layers",
                    "eff/gradient_statistics/exponent_bits": "recommended exponent bits, mean over layers",
                },
            ),
            MethodInfo(
                name="bf16-sr",
                kind="precision",
                class_name="BF16Precision",
                shell="lightning_eff.precision.bf16:BF16Mixin",
                summary="bfloat16 weights, updated by any optimizer with stochastic rounding; nothing more is kept.",
                paper=(
                    "Zamirai, Zhang, Aberger, De Sa: Revisiting BFloat16 Training. 2020. "
                    "https://arxiv.org/abs/2010.06192"
                ),
                composes_with=("bf16-true",),
                strategies=("single_device", "ddp"),
                conflicts=_BF16_CONFLICTS,
                state_keys=("bf16", "seed", "steps", "update"),
            ),
            MethodInfo(
                name="bf16-kahan",
                kind="precision",
                class_name="BF16Precision",
                shell="lightning_eff.precision.bf16:BF16Mixin",
                summary="bfloat16 weights, updated by any optimizer with Kahan compensation; 2 bytes more per weight.",
                paper=(
                    "Zamirai, Zhang, Aberger, De Sa: Revisiting BFloat16 Training. 2020. "
                    "https://arxiv.org/abs/2010.06192"
                ),
                composes_with=("bf16-true",),
                strategies=("single_device", "ddp"),
                conflicts=_BF16_CONFLICTS,
                state_keys=("compensation", "bf16", "update"),
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
                state_keys=("lo", "bf16", "update"),
            ),
        )
    }
)
