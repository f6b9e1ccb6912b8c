"""LightningCLI: ``python examples/train_cli.py fit --config examples/cli_luq4.yaml``.

The precision is a line in the YAML file; add ``--trainer.precision=bf16-mixed`` to override it.
"""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.cli import ArgsType, LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_eff  # noqa: F401 - makes precision: luq4 known to the command line


class DigitsData(L.LightningDataModule):
    """Scikit-learn's handwritten digits: 1200 to train on, 597 to validate."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        self.batch_size, self.parts = batch_size, [TensorDataset(x[part], y[part]) for part in order.split([1200, 597])]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[1], 256)


class DigitsCNN(L.LightningModule):
    """A small convolutional network; nothing in it knows about 4-bit training."""

    def __init__(self, width: int = 32, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(8 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).float(), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main(args: ArgsType = None) -> LightningCLI:
    """Run the command line; ``args`` replaces ``sys.argv`` in tests and notebooks."""
    return LightningCLI(DigitsCNN, DigitsData, args=args, save_config_callback=None)


if __name__ == "__main__":
    main()
