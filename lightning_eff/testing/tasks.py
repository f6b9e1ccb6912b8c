"""A small task that every method is tried on: a classifier with dropout, and batches that a checkpoint can go on with.

Both depend on nothing but their arguments, so that two runs differ only where a method makes them differ.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BATCH", "CLASSES", "FEATURES", "ResumableLoader", "fp16_scaler", "net", "strategy_of", "task", "task_class"]

FEATURES, CLASSES, BATCH = 8, 3, 4
Randomness = Literal["task", "torch"]


def net(*, width: int = 16, dropout: float = 0.2, bias: bool = True) -> nn.Sequential:
    """Return four linear layers with dropout between them; equal arguments give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Linear(FEATURES, width, bias=bias), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width, bias=bias), nn.Tanh(), nn.Dropout(dropout)),
            *(nn.Linear(width, width, bias=bias), nn.ReLU()),
            nn.Linear(width, CLASSES, bias=bias),
        )


@functools.cache
def task_class(root: str) -> type[Any]:
    """Return the LightningModule of one namespace.

    Args:
        root: package of Lightning, ``"lightning.pytorch"`` or ``"pytorch_lightning"``.
    """
    pl: Any = importlib.import_module(root)

    class Task(pl.LightningModule):
        """Learns the class of points with dropout, SGD with momentum and a learning rate that moves every step.

        Args:
            width: features of the hidden layers.
            dropout: share of hidden features that is dropped.
            randomness: who restores the dropout of a run that is cut: ``"task"`` draws it from the place in the run,
                ``"torch"`` from torch's generator, for methods that put the generator back by themselves.
            bias: whether the layers have one.
            manual: optimize by hand.
            spoil: ``"loss"`` makes every loss NaN; the name of a layer, one element of the gradient at its output.
            spoil_at: micro-batches of an epoch whose loss is spoilt; empty for all.
        """

        def __init__(
            self,
            width: int = 16,
            dropout: float = 0.2,
            randomness: Randomness = "task",
            bias: bool = True,
            manual: bool = False,
            spoil: str = "",
            spoil_at: tuple[int, ...] = (),
        ) -> None:
            super().__init__()
            self.net = net(width=width, dropout=dropout, bias=bias)
            self.randomness = randomness
            self.spoil = spoil
            self.spoil_at = spoil_at
            if spoil not in ("", "loss"):
                self.get_submodule(spoil).register_forward_hook(_spoil_gradient)
            self.automatic_optimization = not manual

        def forward(self, x: Tensor) -> Tensor:
            """Return the scores of the classes, in float32."""
            scores: Tensor = self.net(x.to(next(self.net.parameters()).dtype)).float()
            return scores

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            """Return the loss of one micro-batch, and log it."""
            with self._stream(batch_idx):
                loss = F.cross_entropy(self(batch[0]), batch[1])
            if self.spoil == "loss" and (not self.spoil_at or batch_idx in self.spoil_at):
                loss = loss * math.nan
            self.log("loss", loss, on_step=True, on_epoch=True)
            if not self.automatic_optimization:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            """Log the loss of one micro-batch."""
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

        def val_dataloader(self) -> Any:
            """Return micro-batches that training never sees."""
            return ResumableLoader(3, rank=50)

        @contextlib.contextmanager
        def _stream(self, batch_idx: int) -> Iterator[None]:
            if self.randomness == "torch":
                yield
                return
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1 + self.global_rank + 8 * (batch_idx + 1024 * self.current_epoch))
                yield

        def configure_optimizers(self) -> Any:
            """Return SGD with momentum, its learning rate falling with every step."""
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _decayed)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    Task.__name__ = Task.__qualname__ = _CLASSES[root]
    return Task


_CLASSES = {"lightning.pytorch": "LightningTask", "pytorch_lightning": "PytorchLightningTask"}
"""Package of Lightning -> name under which this module has its class, for pickles."""


def __getattr__(name: str) -> Any:
    for root, known in _CLASSES.items():
        if name == known:
            return task_class(root)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _decayed(step: int) -> float:
    return float(0.97**step)


def _spoil_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(_with_nan)


def _with_nan(gradient: Tensor) -> Tensor:
    spoilt = gradient.clone()
    spoilt[-1, 5] = math.nan
    return spoilt


def task(root: str, **options: Any) -> Any:
    """Return a new task of namespace ``root``; ``options`` are arguments of :func:`task_class`'s class."""
    return task_class(root)(**options)


class ResumableLoader:
    """The micro-batches of one rank, in another order every epoch, from the one a checkpoint says is next.

    Lightning keeps ``state_dict()`` of such a loader in its checkpoints.

    Args:
        length: micro-batches of an epoch.
        rank: whose part of the data; ranks with the same number get the same.
    """

    def __init__(self, length: int, *, rank: int = 0) -> None:
        generator = torch.Generator().manual_seed(100 + rank)
        x = torch.randn(length, BATCH, FEATURES, generator=generator, dtype=torch.float32, device="cpu")
        y = (x.sum(-1) > 0).long() + (x[..., 0] > 1).long()
        self._batches = list(zip(x, y, strict=True))
        self.next = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, begin = divmod(self.next, len(self))
        order = torch.randperm(
            len(self), generator=torch.Generator().manual_seed(epoch), dtype=torch.int64, device="cpu"
        ).tolist()
        for place in order[begin:]:
            self.next += 1
            yield self._batches[place]

    def state_dict(self) -> dict[str, int]:
        """Return how many micro-batches have been given out."""
        return {"next": self.next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on behind the micro-batches that had been given out."""
        self.next = state_dict["next"]


# ------------------------------------------------------------------------------------------------- for refusals


def fp16_scaler(root: str) -> list[Any]:
    """Return the plugins of a Trainer that trains in 16-mixed with a loss scaler, which Lightning keeps for GPUs."""
    plugins = importlib.import_module(f"{root}.plugins")
    return [plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]


def strategy_of(root: str, name: str, **attributes: Any) -> Any:
    """Return an object of one of Lightning's strategies that cannot be built here, for what looks at its class alone.

    Args:
        root: package of Lightning.
        name: of the class, ``"FSDPStrategy"``.
        attributes: what the object has.
    """
    made: Any = object.__new__(getattr(importlib.import_module(f"{root}.strategies"), name))
    for key, value in attributes.items():
        setattr(made, key, value)
    return made
