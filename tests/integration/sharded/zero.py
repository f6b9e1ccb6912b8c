"""Runs of DeepSpeed's ZeRO on gloo ranks: ``python -m tests.integration.sharded.zero '[{"stage": 2, ...}, ...]'``.

Lightning's ``DeepSpeedStrategy`` refuses everything but CUDA. :class:`CPUDeepSpeed` gets past that, for tests only.
Each case is a run, reported as one line of JSON; stage -1 is DDP. The process is one rank of a ``torchrun`` launch:
DeepSpeed keeps its communicators to the end of a process, so these runs have processes of their own.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor

from tests.integration.sharded.models import Task, asked_for, run

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class CPUDeepSpeed(DeepSpeedStrategy):
    """A test harness, not a product: Lightning's checks for CUDA left out."""

    root_device = property(lambda self: torch.device("cpu", 0))

    def setup_environment(self) -> None:
        self.accelerator.setup_device(self.root_device)
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def whole(parameter: Any) -> Tensor:
    """All of a parameter, in float32."""
    from deepspeed.utils import safe_get_full_fp32_param

    sharded = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
    return safe_get_full_fp32_param(parameter) if sharded else parameter


def fit(
    stage: int,
    precision: str,
    *,
    late: bool = False,
    poison: Any = (),
    narrow: bool = False,
    attention: bool = False,
    lr: float = 0.0625,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One fit; method ``options`` are given by callback."""
    task = Task(late=late, poison=poison, narrow=narrow, attention=attention, lr=lr)
    more |= asked_for(precision, options)
    if stage < 0:
        return run(task, DDPStrategy(process_group_backend="gloo"), RANK, WORLD_SIZE, **more)
    strategy = CPUDeepSpeed(stage=stage, process_group_backend="gloo")
    return run(task, strategy, RANK, WORLD_SIZE, whole=whole, **more)


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print(json.dumps(fit(**case)), flush=True)
