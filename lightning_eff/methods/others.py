"""Rows of the strategies and the callbacks."""

from __future__ import annotations

import math
from typing import Any

from lightning_eff.checks import SEED, Maybe, Real, Text, Whole, YesNo
from lightning_eff.methods.info import MethodInfo
from lightning_eff.methods.state import LAYER_OF_PRUNING, LAYER_OF_STATISTICS, ListOf, Record, Table, TensorOf


def _one_part_for_each_stage(found: dict[str, Any]) -> str:
    starts, layers, parts = found["starts"], found["layers"], [part["stage"] for part in found["stages"]]
    if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= len(layers):
        return f"stages that start at layers 0 to {len(layers) - 1}, the first at 0, each after the one before"
    if sorted(parts) != list(range(len(starts))):
        return f"one part of stages for each of the {len(starts)} starts"
    return ""


def _seeded(found: dict[str, Any]) -> str:
    pruned = any(layer["calls"] for layers in found["ranks"] for layer in layers.values())
    return "a seed, where layers have been pruned" if pruned and found["seed"] is None else ""


ROWS = (
    MethodInfo(
        name="dropcompute",
        kind="strategy",
        class_name="DropComputeStrategy",
        shell="lightning_eff.strategies.dropcompute.strategy:DropComputeMixin",
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
        state=Record(
            {
                "threshold_s": Real(0, math.inf),
                "measured": Maybe(YesNo()),
                "steps": Whole(),
                "computed": Whole(),
                "dropped": Whole(),
            },
            optional={"measured": None},  # the first versions did not write it
        ),
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
        shell="lightning_eff.strategies.pipelined_bp.strategy:PipelinedBPMixin",
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
        state=Record(
            {
                "samples": Whole(),
                "seed": SEED,
                "in_flight": Whole(1),
                "layers": ListOf(Text(), 1),
                "starts": ListOf(Whole(), 1),
                "stages": ListOf(
                    Record(
                        {
                            "stage": Whole(),
                            "versions": Table(ListOf(TensorOf()), names=Text("a number", "[0-9]{1,15}")),
                            "previous": Maybe(ListOf(TensorOf())),
                        }
                    ),
                    1,
                ),
            },
            also=_one_part_for_each_stage,
        ),
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
        shell="lightning_eff.callbacks.gradients.pruning:GradientPruningMixin",
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
        state=Record({"seed": Maybe(SEED), "ranks": ListOf(Table(LAYER_OF_PRUNING), 1)}, also=_seeded),
        metrics={
            "eff/gradient_pruning/sparsity": "share of zeros in the pruned gradients, over all layers",
            "eff/gradient_pruning/sigma_log2": "deviation of log2|g| at the last fit, octaves, mean of layers",
        },
    ),
    MethodInfo(
        name="gradient_statistics",
        kind="callback",
        class_name="GradientStatistics",
        shell="lightning_eff.callbacks.gradients.statistics:GradientStatisticsMixin",
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
        state=Record({"layers": Table(LAYER_OF_STATISTICS)}),
        metrics={
            "eff/gradient_statistics/sigma_log2": "deviation of log2|g|, octaves, mean over layers",
            "eff/gradient_statistics/zeros": "share of gradient elements that are zero, mean over layers",
            "eff/gradient_statistics/exponent_bits": "recommended exponent bits, mean over layers",
        },
    ),
)
