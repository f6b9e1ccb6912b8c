"""Train a network as a pipeline of two processes: ``python examples/pipeline.py``.

The first layers live in one process and the last in the other; both update with every micro-batch, the pipeline is
never drained, and late gradients are allowed for by weight prediction and spike compensation. The LightningModule
knows nothing of it. ``--devices 1`` computes the same delays in one process, to the same bits.

What it shows is the mechanism. On one machine DDP would use two cores as well: pipelines are for models that do not
fit, and for links too slow for DDP (``python -m benchmarks.pipelined_bp``).
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff import PipelinedBPStrategy


class YourModule(L.LightningModule):
    """Eight layers in an ``nn.Sequential``: a stack that pipelined_bp finds and cuts by measured times."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.ReLU()) for _ in range(6)]
        self.net = nn.Sequential(nn.Linear(64, 512), *blocks, nn.Linear(512, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=2e-3, momentum=0.9)


def main(argv: list[str] | None = None) -> float:
    """Train, validate the whole model, and return its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--devices", type=int, default=2, help="processes")
    parser.add_argument("--output", default="demo_output", help="folder for the picture of the schedule")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, held_out = (TensorDataset(x[part], y[part]) for part in order.split([1200, 597]))
    trainer = L.Trainer(
        strategy=PipelinedBPStrategy(stages=2),  # <- the one argument; or "pipelined_bp" for a stage per process
        devices=options.devices,
        accelerator="cpu",
        max_epochs=options.epochs,
        check_val_every_n_epoch=options.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=options.output,
    )
    trainer.fit(YourModule(), DataLoader(train, 16, shuffle=True, drop_last=True), DataLoader(held_out, 256))
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    if trainer.is_global_zero:
        print(f"accuracy on held-out digits after {options.epochs} epochs: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
