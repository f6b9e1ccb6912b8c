"""What changes in a project you already have: one import and one argument (``python examples/add_to_your_project.py``).

Everything but the marked lines is an ordinary Lightning script.
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_eff  # <- 1. makes the precision strings known


class YourModule(L.LightningModule):
    """Stands for the model you have; it does not know about 4-bit training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(argv: list[str] | None = None) -> float:
    """Train, and return the last training loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="luq4", help=f"of Lightning, or one of ours ({lightning_eff.__name__})")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(argv)
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    trainer = L.Trainer(
        max_epochs=options.epochs,
        precision=options.precision,  # <- 2. precision="luq4"
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(YourModule(), DataLoader(data, batch_size=64, shuffle=True))
    return float(trainer.callback_metrics["train_loss"])


if __name__ == "__main__":
    print(f"last training loss: {main():.3f}")
