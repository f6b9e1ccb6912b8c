"""Rows of the callbacks."""

from __future__ import annotations

from typing import Any

from lightning_eff.checks import SEED, Maybe, Real, Whole
from lightning_eff.methods import papers
from lightning_eff.methods.info import MethodInfo
from lightning_eff.methods.state import LAYER_OF_PRUNING, LAYER_OF_STATISTICS, ListOf, Record, Table


def _seeded(found: dict[str, Any]) -> str:
    pruned = any(layer["calls"] for layers in found["ranks"] for layer in layers.values())
    return "a seed, where layers have been pruned" if pruned and found["seed"] is None else ""


def _rates_fit(found: dict[str, Any]) -> str:
    """Learning rates stand for the same parameter groups; before the phase there are no first ones yet."""
    known, begun = len(found["start_lrs"]) <= len(found["base_lrs"]), found["start_step"] is not None
    fits = known and (begun or not found["start_lrs"])
    return "" if fits else "at most as many start_lrs as base_lrs, and a start_step where there are any"


def _in_a_row_at_most(found: dict[str, Any]) -> str:
    return "" if found["in_a_row"] <= found["skipped"] else "at most as many in_a_row as skipped"


_RATES = ListOf(Real(0))


ROWS = (
    MethodInfo(
        name="low_precision",
        kind="callback",
        family="numerics",
        class_name="LowPrecision",
        mixin="lightning_eff.callbacks.precision.low_precision:LowPrecisionMixin",
        summary="Puts a low-precision method onto whatever precision plugin the Trainer has; needs no string.",
        paper=papers.OURS,
        arguments='"luq4"',
        conflicts={"what its method refuses": "it is the method's string in another form, with the same reasons"},
    ),
    MethodInfo(
        name="luq_fine_tuning",
        kind="callback",
        family="numerics",
        class_name="LUQFineTuning",
        mixin="lightning_eff.callbacks.precision.luq_fine_tuning:LUQFineTuningMixin",
        summary="Trains the last steps of a luq4 run with INT4 weights alone.",
        paper=papers.LUQ,
        arguments="steps=300",
        strategies=("single_device", "ddp"),
        conflicts={
            "precision other than luq4": "it is the end of a run in 4 bits; use precision='luq4'",
            "no known end": "the phase is counted from there; set max_steps or max_epochs (and a sized dataloader)",
            "manual_optimization with max_epochs and max_steps": "it cannot tell at which batch the run ends",
        },
        state=Record({"start_step": Maybe(Whole()), "start_lrs": _RATES, "base_lrs": _RATES}, also=_rates_fit),
    ),
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
    MethodInfo(
        name="non_finite_guard",
        kind="callback",
        family="numerics",
        class_name="NonFiniteGuard",
        mixin="lightning_eff.callbacks.run.non_finite_guard:NonFiniteGuardMixin",
        summary="Stops or skips a step with a NaN or Inf gradient or loss before it changes a parameter.",
        paper=papers.OURS,
        strategies=("single_device", "ddp"),
        conflicts={
            "fsdp": "not shown to work yet; use strategy='ddp'",
            "fsdp2": "its ranks hold parts of gradients; use strategy='ddp'",
            "deepspeed": "it keeps gradients in buffers of its own; use strategy='ddp'",
            "dropcompute": "its ranks may drop their losses; it has this guard itself, on_nonfinite=",
            "pipelined_bp": "its stages step at different samples; it has this guard itself, on_nonfinite=",
        },
        state=Record({"skipped": Whole(), "in_a_row": Whole()}, also=_in_a_row_at_most),
        metrics={"eff/non_finite_guard/skipped": "optimizer steps of the run that were skipped so far"},
    ),
)
