"""Small models, converted or in a Trainer, that the tests of the precision plugins share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.precision.formats.luq import LUQOptions
from lightning_eff.precision.layers.convert import Conversion, convert

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
ALL = LUQOptions(exempt_first_last=False)


def every_layer(**options: Any) -> LUQOptions:
    return LUQOptions(**{"exempt_first_last": False, **options})


def converted(model: nn.Module, **options: Any) -> tuple[nn.Module, Conversion]:
    """``model``, its every supported layer converted."""
    return model, convert(model, every_layer(**options))


def body() -> nn.Sequential:
    """First and last are exempt by default; a linear, a convolution-free middle of two layers is converted."""
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.ReLU(),
                         nn.Linear(24, 3))  # fmt: skip


DATA = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
TARGET = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(2))


def task(root: str = "lightning.pytorch", **hooks: Callable[..., Any]) -> Any:
    """A LightningModule around :func:`body`; ``hooks`` become its methods."""
    pl = importlib.import_module(root)

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = body()
            self.losses: list[float] = []

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x.to(next(self.net.parameters()).dtype)).float(), y)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            return loader()

    return type("Task", (Task,), hooks)()


def loader(batch_size: int = 8) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA, TARGET), batch_size=batch_size)


class ResumableLoader:
    """The batches of :func:`loader`, from the one a checkpoint says is next."""

    def __init__(self) -> None:
        self.batches, self.next = list(loader()), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for place in range(self.next % len(self.batches), len(self.batches)):
            self.next = place + 1
            yield self.batches[place]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next % len(self.batches)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.next = state_dict["next"]


def trainer(root: str = "lightning.pytorch", **options: Any) -> Any:
    pl = importlib.import_module(root)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    small = dict(accelerator="cpu", devices=1, max_epochs=1, limit_val_batches=0)
    return pl.Trainer(**{**quiet, **small, **options})


def parameters_of(module: nn.Module) -> Tensor:
    """Every parameter as one vector; equal runs have equal ones."""
    return torch.cat([p.detach().reshape(-1).double() for p in module.parameters()])


def fit(root: str = "lightning.pytorch", *, seed: int = 3, hooks: Any = None, **options: Any) -> tuple[Any, Any]:
    """Fit from ``seed``; the trained task and its Trainer."""
    model, runner = task(root, **(hooks or {})), trainer(root, **options)
    torch.manual_seed(seed)
    runner.fit(model)
    return model, runner
