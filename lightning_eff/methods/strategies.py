"""Rows of the strategies."""

from __future__ import annotations

import math
from typing import Any

from lightning_eff.checks import SEED, Maybe, Real, Text, Whole, YesNo
from lightning_eff.methods import papers
from lightning_eff.methods.info import MethodInfo
from lightning_eff.methods.state import ListOf, Record, Table, TensorOf


def _one_part_for_each_stage(found: dict[str, Any]) -> str:
    starts, layers, parts = found["starts"], found["layers"], [part["stage"] for part in found["stages"]]
    if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= len(layers):
        return f"stages that start at layers 0 to {len(layers) - 1}, the first at 0, each after the one before"
    if sorted(parts) != list(range(len(starts))):
        return f"one part of stages for each of the {len(starts)} starts"
    return ""


ROWS = (
    MethodInfo(
        name="dropcompute",
        kind="strategy",
        family="stragglers",
        class_name="DropComputeStrategy",
        mixin="lightning_eff.strategies.dropcompute.strategy:DropComputeMixin",
        summary="Data parallelism that does not wait for stragglers: late ranks drop micro-batches.",
        paper=papers.DROPCOMPUTE,
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
        family="staleness",
        class_name="PipelinedBPStrategy",
        mixin="lightning_eff.strategies.pipelined_bp.strategy:PipelinedBPMixin",
        summary="Pipeline parallelism without bubble: stages update at once and allow for late gradients.",
        paper=papers.PIPELINED_BP,
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
)
