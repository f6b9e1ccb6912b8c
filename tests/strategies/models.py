"""A small regression task whose gradients every test of a strategy can write out by hand."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FEATURES, BATCH = 6, 4
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


def data(samples: int, seed: int = 1) -> Tensor:
    return torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.sum(1, keepdim=True).sin()).square().mean()


def task(root: str = NAMESPACES[0], **hooks: Callable[..., Any]) -> Any:
    """SGD with momentum and a schedule that moves with every step; ``hooks`` become methods."""
    pl = importlib.import_module(root)

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = net(), nn.Linear(3, 3)
            self.computed: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.computed.append(batch_idx)
            loss = loss_of(self.net, batch[0])
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", loss_of(self.net, batch[0]), sync_dist=True)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return type("Task", (Task,), hooks)()


def loader(rank: int, world: int, samples: int) -> Any:
    """This rank's part of ``samples``: every ``world``-th batch."""
    batches = data(samples).split(BATCH)[rank::world]
    rows = torch.utils.data.TensorDataset(torch.cat(batches))
    return torch.utils.data.DataLoader(rows, batch_size=BATCH)


def trainer(strategy: Any, root: str = NAMESPACES[0], **options: Any) -> Any:
    pl = importlib.import_module(root)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    small = dict(accelerator="cpu", devices=2, max_epochs=1, use_distributed_sampler=False, num_sanity_val_steps=0)
    return pl.Trainer(strategy=strategy, **{**quiet, **small, **options})


def stock() -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(process_group_backend="gloo")


def ours(**options: Any) -> Any:
    from lightning_eff.strategies import DropComputeStrategy

    return DropComputeStrategy(**{"threshold": math.inf, "process_group_backend": "gloo", **options})


def parameters_of(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).double() for p in module.parameters()])
