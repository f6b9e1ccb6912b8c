"""Data that is already on the machine: scikit-learn's digits and the standard library's source code.

Both splits are fixed: they do not depend on the seed of a run, so runs with different seeds see the same
validation set.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

__all__ = ["ASCII_SIZE", "DigitsData", "StdlibText", "stdlib_source"]

ASCII_SIZE = 128  # ids 0..127; every other character of a source file is read as "?"
SPLIT_SEED = 0
VALIDATION_DIGITS = 597  # of 1797 images: one image is 0.17 percentage points of accuracy
VALIDATION_EVERY = 10  # every tenth file, by name, is held out


class DigitsData(L.LightningDataModule):
    """Scikit-learn's 1797 handwritten digits: images (1, 8, 8) in [0, 1], 1200 to train on and 597 to validate.

    Args:
        batch_size: images per micro-batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str | None = None) -> None:
        """Load the images and make the fixed split."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
        held_out, kept = order[:VALIDATION_DIGITS], order[VALIDATION_DIGITS:]
        self.train = TensorDataset(images[kept], labels[kept])
        self.validation = TensorDataset(images[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return shuffled batches; the last, smaller one is dropped so that every step costs the same."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the held-out images in a fixed order."""
        return DataLoader(self.validation, 256)


@cache
def stdlib_source() -> tuple[Tensor, Tensor]:
    """Return (training text, validation text) as uint8 character ids, split by file.

    The text is every top-level module of this interpreter's standard library in alphabetical order, so it changes
    with the Python version; compare runs made with the same one.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, file in enumerate(files):
        text = file.read_text(encoding="utf-8", errors="replace").encode("ascii", errors="replace")
        parts[index % VALIDATION_EVERY == 0].append(text)
    train, validation = (torch.from_numpy(np.frombuffer(b"".join(part), np.uint8).copy()) for part in parts)
    return train, validation


class _Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of ``context`` characters and, shifted by one, the characters to predict."""

    def __init__(self, text: Tensor, starts: Tensor, context: int) -> None:
        self.text, self.starts, self.context = text, starts.tolist(), context

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = self.starts[index]
        window = self.text[start : start + self.context + 1].long()
        return window[:-1], window[1:]


class StdlibText(L.LightningDataModule):
    """Character windows of the standard library's source code.

    Args:
        context: characters per window, T.
        batch_size: windows per micro-batch.
        steps: micro-batches in one epoch; the windows are drawn once, from ``seed``.
        seed: decides which training windows are drawn, and nothing else.
        validation_windows: how many windows, evenly spaced over the held-out files, are validated on.
    """

    def __init__(
        self, context: int = 128, batch_size: int = 16, steps: int = 300, seed: int = 0, validation_windows: int = 256
    ) -> None:
        super().__init__()
        self.context, self.batch_size, self.steps = context, batch_size, steps
        self.seed, self.validation_windows = seed, validation_windows

    def setup(self, stage: str | None = None) -> None:
        """Read the source code and draw the windows."""
        train, validation = stdlib_source()
        generator = torch.Generator().manual_seed(self.seed)
        limit = len(train) - self.context
        starts = torch.randint(limit, (self.steps * self.batch_size,), generator=generator)
        self.train = _Windows(train, starts, self.context)
        limit = len(validation) - self.context - 1
        spaced = torch.linspace(0, limit, self.validation_windows, dtype=torch.float64).long()
        self.validation = _Windows(validation, spaced, self.context)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the drawn windows in the order they were drawn."""
        return DataLoader(self.train, self.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the evenly spaced held-out windows."""
        return DataLoader(self.validation, 32)
