"""Small models and data that the tests of the callbacks on gradients share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROOTS = {"lightning.pytorch": "lightning_eff.callbacks", "pytorch_lightning": "lightning_eff.pytorch_lightning"}


class Lognormal(LightningModule):
    """The neural gradient of its one layer is lognormal, with ``zeros`` of it zero."""

    def __init__(self, sigma: float = 2.0, zeros: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 256)
        self.sigma, self.zeros = sigma, zeros

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        y = self.layer(batch[0])
        g = torch.randn_like(y).mul(self.sigma).sub(7).exp() * torch.randn_like(y).sign()
        return (y * g * (torch.rand_like(y) >= self.zeros)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Net(LightningModule):
    """Convolutions, in-place activations, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.ReLU())
        self.twice = nn.Linear(32, 32)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(self.twice(self.head(self.conv(x))).relu()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def images(n: int = 96, batch_size: int = 16) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(n) % 10), batch_size=batch_size)


def vectors(steps: int, rows: int = 512) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(steps * rows, 64)), batch_size=rows)


def trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    small = dict(max_epochs=1, log_every_n_steps=1, accelerator="cpu", devices=1, default_root_dir=tmp_path)
    return Trainer(**{**quiet, **small, **options}, callbacks=list(callbacks))


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
