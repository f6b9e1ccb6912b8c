"""Strategies, models and Trainers that tests of lifetimes use again and again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

M = 2
"""Micro-batches of a step under dropcompute."""


def new_strategy(name: str) -> Any:
    """Of that name: ``plain`` is what a Trainer takes by itself."""
    from lightning_eff.strategies import DropComputeStrategy, PipelinedBPStrategy

    common = {"process_group_backend": "gloo", "timeout_s": 30.0}
    return {
        "plain": lambda: "auto",  # with what is accumulated under the strategy it is compared with
        "dropcompute": lambda: DropComputeStrategy(threshold=math.inf, **common),
        "one stage": lambda: PipelinedBPStrategy(stages=1, module="net", **common),
        "three stages": lambda: PipelinedBPStrategy(
            stages=["net.1", "net.3"], module="net", schedule_picture=False, **common
        ),
        "two stages": lambda: PipelinedBPStrategy(stages=["net.2"], module="net", schedule_picture=False, **common),
    }[name.partition(" for ")[0]]()


def new_model(**hooks: Callable[..., Any]) -> Any:
    """Of layers with and without a body to be unfrozen; momentum, so that an optimizer has a state."""
    from lightning.pytorch import LightningModule

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = nn.Linear(6, 8)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.head, self.lr = nn.Linear(8, 1), 0.05

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.net(self.backbone(x)))
            return out

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = (self(batch[0]) - batch[0].sum(1, keepdim=True).sin()).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self(batch[0]).square().mean(), sync_dist=True)

        test_step = validation_step

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(trained, lr=self.lr, momentum=0.9)

    return type("Model", (Model,), hooks)()


def rows(seed: int = 1) -> Any:
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)


def new_trainer(strategy: Any, **options: Any) -> Any:
    from lightning.pytorch import Trainer

    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    small = dict(accelerator="cpu", devices=1, max_epochs=2, num_sanity_val_steps=0, use_distributed_sampler=False)
    if options.get("barebones"):
        quiet, small = {}, {k: v for k, v in small.items() if k != "num_sanity_val_steps"}
    return Trainer(strategy=strategy, **{**quiet, **small, **options})


class Run:
    """One use of a strategy in a scenario.

    Attributes:
        strategy: used in every Trainer of the scenario.
        folder: for checkpoints.
        accumulate: micro-batches of a step.
        before_last: a copy of the model before the last fit, where a scenario says it may be repeated from there.
    """

    def __init__(self, strategy: Any, folder: str, accumulate: int, world: int = 1) -> None:
        self.strategy, self.folder, self.accumulate, self.world = strategy, folder, accumulate, world
        self.before_last: Any = None

    def trainer(self, **options: Any) -> Any:
        options = {"accumulate_grad_batches": self.accumulate, **options}
        if not isinstance(self.strategy, str):  # Lightning refuses a strategy that has them, whatever strategy it is
            self.strategy.accelerator = self.strategy.parallel_devices = None
        return new_trainer(self.strategy, devices=self.world, **options)

    def longer(self, trainer: Any, model: Any, epochs: int = 4) -> Any:
        self.before_last = copy.deepcopy(model)
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, rows(), rows(2))
        return model
