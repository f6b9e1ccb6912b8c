"""ResNet-18 on CIFAR-10 in 4 bits: ``python examples/cifar10.py --data cifar-10-batches-bin``.

Needs the binary version of CIFAR-10 (cifar-10-binary.tar.gz, unpacked by you) and nothing else: an image is 1 byte of
label and 3072 bytes of pixels, read here in four lines. A GPU, or patience, is advised.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_eff  # noqa: F401 - makes precision="luq4" known to Lightning

RECORD_BYTES = 1 + 3 * 32 * 32
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) uint8 and labels (N,) of one binary file.

    Raises:
        ValueError: the file does not consist of whole records.
    """
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % RECORD_BYTES:
        raise ValueError(
            f"{path} holds {raw.size} bytes, not a multiple of {RECORD_BYTES}: not a CIFAR-10 binary file."
        )
    records = torch.from_numpy(raw).view(-1, RECORD_BYTES)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


class CIFAR10Data(L.LightningDataModule):
    """CIFAR-10 from its binary files.

    Args:
        folder: holds ``data_batch_1.bin`` .. ``data_batch_5.bin`` and ``test_batch.bin``.
        batch_size: images per micro-batch.
    """

    def __init__(self, folder: Path, batch_size: int = 128) -> None:
        super().__init__()
        self.folder, self.batch_size = folder, batch_size

    def setup(self, stage: str | None = None) -> None:
        batches = [read_batch(path) for path in sorted(self.folder.glob("data_batch_*.bin"))]
        if not batches:
            raise FileNotFoundError(f"no data_batch_*.bin in {self.folder}; unpack cifar-10-binary.tar.gz there.")
        images, labels = zip(*batches, strict=True)
        self.train = TensorDataset(torch.cat(images), torch.cat(labels))
        self.validation = TensorDataset(*read_batch(self.folder / "test_batch.bin"))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.validation, 500)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        narrow = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else narrow

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def resnet18(width: int) -> nn.Sequential:
    """Return ResNet-18 with a 3x3 stem, for images of 32x32."""
    sizes = [width, width, 2 * width, 4 * width, 8 * width]
    pairs = [(a, b, 1 + (a != b)) for a, b in pairwise(sizes)]
    blocks = [Block(*part) for a, b, stride in pairs for part in ((a, b, stride), (b, b, 1))]
    stem = (nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


class CIFAR10ResNet(L.LightningModule):
    """ResNet-18 with SGD and one-cycle; crops and flips are made on the device, per micro-batch."""

    def __init__(self, width: int = 64, lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.lr = resnet18(width), lr

    def _images(self, pixels: Tensor) -> Tensor:
        mean, std = MEAN.to(pixels.device), STD.to(pixels.device)
        return (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images = F.pad(self._images(batch[0]), (4, 4, 4, 4))
        (top, left), flip = torch.randint(9, (2,)).tolist(), bool(torch.rand(()) < 0.5)
        images = images[:, :, top : top + 32, left : left + 32]
        return F.cross_entropy(self.net(images.flip(3) if flip else images).float(), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        right = self.net(self._images(batch[0])).argmax(1) == batch[1]
        self.log("val_accuracy", right.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(argv: list[str] | None = None) -> float:
    """Train and return the accuracy on the test images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the unpacked binary files")
    parser.add_argument("--precision", default="luq4")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args(argv)
    trainer = L.Trainer(max_epochs=options.epochs, precision=options.precision, logger=False)
    trainer.fit(CIFAR10ResNet(options.width), CIFAR10Data(options.data, options.batch_size))
    return float(trainer.callback_metrics["val_accuracy"])


if __name__ == "__main__":
    print(f"test accuracy: {main():.4f}")
