"""Rows of the callbacks."""

from __future__ import annotations

from typing import Any

from lightning_eff.checks import SEED, Maybe
from lightning_eff.methods import papers
from lightning_eff.methods.info import MethodInfo
from lightning_eff.methods.state import LAYER_OF_PRUNING, LAYER_OF_STATISTICS, ListOf, Record, Table


def _seeded(found: dict[str, Any]) -> str:
    pruned = any(layer["calls"] for layers in found["ranks"] for layer in layers.values())
    return "a seed, where layers have been pruned" if pruned and found["seed"] is None else ""


ROWS = (
    MethodInfo(
        name="gradient_pruning",
        kind="callback",
        family="numerics",
        class_name="GradientPruning",
        mixin="lightning_eff.callbacks.gradients.pruning:GradientPruningMixin",
        summary="Unbiased pruning of the gradients at layer outputs to a set share of zeros.",
        paper=papers.NEAR_LOGNORMAL,
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
        family="numerics",
        class_name="GradientStatistics",
        mixin="lightning_eff.callbacks.gradients.statistics:GradientStatisticsMixin",
        summary="Measures how wide neural gradients are and recommends a float format for each layer.",
        paper=papers.NEAR_LOGNORMAL,
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
