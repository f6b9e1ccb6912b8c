"""LightningModules of the examples: nothing in them knows about 4-bit training."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tasks.data import ASCII_SIZE
from benchmarks.tasks.models import GPT, DigitsNet

__all__ = ["CharGPT", "DigitsCNN"]


class _OneCycle(L.LightningModule):
    """Shared optimiser: AdamW, 10 % linear warm-up, cosine decay over the steps of this run."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's logits."""
        return self.net(x)

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, stepped every optimiser step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=int(self.trainer.estimated_stepping_batches), pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DigitsCNN(_OneCycle):
    """A small convolutional network on handwritten digits.

    Args:
        width: channels of the first convolution.
        lr: peak learning rate.
    """

    def __init__(self, width: int = 32, lr: float = 2e-3) -> None:
        super().__init__(DigitsNet(width), lr)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of one micro-batch."""
        images, labels = batch
        return F.cross_entropy(self(images).float(), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the share of digits named correctly."""
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(1) == labels).float().mean(), batch_size=len(labels))


class CharGPT(_OneCycle):
    """A small GPT that predicts the next character of Python source code.

    Args:
        width: model width.
        layers: number of transformer blocks.
        heads: attention heads.
        context: characters per window.
        lr: peak learning rate.
    """

    def __init__(self, width: int = 256, layers: int = 4, heads: int = 4, context: int = 128, lr: float = 1e-3) -> None:
        super().__init__(GPT(ASCII_SIZE, width, layers, heads, context), lr)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, targets = batch
        return F.cross_entropy(self(ids).float().flatten(0, 1), targets.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy per character, in nats."""
        return self._loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log bits per character: lower is better, 7 is a guess among 128 characters."""
        self.log("val_bits_per_char", self._loss(batch) / math.log(2), batch_size=len(batch[0]))
