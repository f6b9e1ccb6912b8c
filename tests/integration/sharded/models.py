"""A small model for sharded strategies, its Trainer, and what a run reports.

Two choices make equal methods give equal bits, so that comparisons need no tolerance. Learning rate and momentum are
powers of two: otherwise the rounding of SGD depends on where in a flat buffer an element lies. Attention is an option:
FSDP2 and ZeRO-3 hand a module copies of its inputs, by which torch no longer sees that query, key and value are one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import lightning_eff
from lightning_eff.errors import NonFiniteGradientError
from lightning_eff.precision.layers.twins import Twin

WIDTH = 24
DATA = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
TARGET = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(2))
CONVERTED = {"block.up": "Linear", "block.down": "Linear", "block.relu": "ReLU", "alone": "Linear",
             "mixer.conv": "Conv1d"}  # fmt: skip
"""Layers the methods convert -> their own class."""


class Block(nn.Module):
    """Two linear maps; the inner width is odd, so that two ranks get shards of unequal size."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 33), nn.Linear(33, WIDTH), nn.LayerNorm(WIDTH)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.relu(self.up(x))))


class Mixer(nn.Module):
    """Self-attention, if wanted, and a convolution, over a sequence of one."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True) if attention else None
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        if self.attention is not None:
            x = x + self.attention(x, x, x, need_weights=False)[0]
        return (x + self.conv(x.transpose(1, 2)).transpose(1, 2)).mean(1)


class Net(nn.Module):
    """First and last layer are exempt by default. ``gain`` has one element: one of two ranks holds none of it."""

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        self.stem, self.block, self.alone = nn.Linear(12, WIDTH), Block(), nn.Linear(WIDTH, WIDTH)
        self.mixer = Mixer(attention)
        self.head, self.gain = nn.Linear(WIDTH, 3), nn.Parameter(torch.ones(1))
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.mixer(torch.tanh(self.alone(self.block(self.stem(x)))))) * self.gain
        return x + torch.sqrt(self.gain * 0) if self.broken else x  # adds 0, and a NaN to the gradient of gain alone


class Task(pl.LightningModule):
    """Classify with :class:`Net`.

    Args:
        shard: called with the task in ``configure_model``, once.
        late: make the net in ``configure_model``, as models too large for one rank are.
        poison: (rank, micro-batch) of a loss that is NaN.
        narrow: let the loss be finite instead, and one element of the gradient NaN.
        attention: whether the net has any.
        lr: learning rate.
    """

    def __init__(
        self,
        shard: Callable[[Any], None] | None = None,
        *,
        late: bool = False,
        poison: Sequence[int] = (),
        narrow: bool = False,
        attention: bool = False,
        lr: float = 0.0625,
    ) -> None:
        super().__init__()
        self.net: Any = None if late else self._make(attention)
        self.shard, self.attention, self.lr = shard, attention, lr
        self.poison, self.narrow = tuple(poison), narrow
        self.losses: list[float] = []
        self.val_losses: list[float] = []
        self.seen: dict[str, str] = {}

    @staticmethod
    def _make(attention: bool) -> Net:
        torch.manual_seed(0)
        return Net(attention)

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self._make(self.attention)
        shard, self.shard = self.shard, None  # Lightning calls this hook once per fit, test, ...
        if shard is not None:
            shard(self)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x.to(self.net.head.weight.dtype)).float(), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        poisoned = self.poison == (self.global_rank, batch_idx)
        self.net.broken = poisoned and self.narrow
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.seen = kinds(self.net)
        return loss * torch.nan if poisoned and not self.narrow else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_losses.append(self.loss(batch).item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


class Batches:
    """A rank's half of the data in batches of 8, from the one a checkpoint says is next."""

    def __init__(self, rank: int) -> None:
        part = slice(rank * 32, rank * 32 + 32)
        self.batches, self.next = list(zip(DATA[part].split(8), TARGET[part].split(8), strict=True)), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for place in range(self.next % len(self), len(self)):
            self.next = place + 1
            yield self.batches[place]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next % len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.next = state_dict["next"]


class Record(Callback):
    """Read the whole parameters by ``whole`` when training ends; save to ``path`` after ``at`` steps."""

    def __init__(self, whole: Callable[[Any], Tensor], path: Path | None, at: int | None) -> None:
        self.whole, self.path, self.at = whole, path, at
        self.parameters: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)

    def read(self, task: Any) -> None:
        self.parameters = {name: self.whole(p).detach().float().clone() for name, p in task.named_parameters()}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.read(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.read(pl_module)


def kinds(net: nn.Module) -> dict[str, str]:
    """Class names of the layers that are converted, and of attention."""
    named = dict(net.named_modules())
    found = {name: named[name] for name in (*CONVERTED, "mixer.attention") if name in named}
    return {name: f"{'Quant' * isinstance(m, Twin)}{type(m).__name__}" for name, m in found.items()}


def digest(parameters: dict[str, Tensor]) -> str:
    """Equal parameters have equal ones."""
    return hashlib.sha256(torch.cat([p.reshape(-1) for p in parameters.values()]).numpy().tobytes()).hexdigest()


def asked_for(precision: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments of a Trainer with ``precision`` and ``options`` of its method; small layers are converted as well."""
    method, _, base = precision.partition("+")
    if method in ("fp8", "fp8-rowwise", "fp8-delayed"):
        options = {"filter_slow": False, **(options or {})}
    if options is None:
        return {"precision": precision}
    return {"precision": base or "32-true", "callbacks": [lightning_eff.LowPrecision(method, options)]}


def run(
    task: Task,
    strategy: Any,
    rank: int,
    world_size: int,
    *,
    whole: Callable[[Any], Tensor] = torch.clone,
    resume: str | None = None,
    save: str | None = None,
    at: int | None = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> dict[str, Any]:
    """Fit ``task`` for two epochs of four micro-batches per rank; plain figures of the run.

    ``whole`` makes a whole tensor of a parameter. A checkpoint is written to ``save`` after ``at`` steps. What stopped
    the run is reported under ``"error"``.
    """
    record = Record(whole, None if save is None else Path(save), at)
    trainer = pl.Trainer(
        **{
            **dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False),
            **dict(accelerator="cpu", devices=world_size, strategy=strategy, max_epochs=2, limit_val_batches=0),
            **dict(use_distributed_sampler=False, callbacks=[*callbacks, record]),
            **options,
        }
    )
    torch.manual_seed(3 if resume is None else 4)  # a resumed run starts from another seed
    error = ""
    try:
        trainer.fit(task, Batches(rank), Batches(rank), ckpt_path=resume)
    except NonFiniteGradientError as stopped:
        error = str(stopped)
    plugin = trainer.precision_plugin
    return {
        "losses": task.losses,
        "val_losses": task.val_losses,
        "digest": digest(record.parameters),
        "parameters": torch.cat([p.reshape(-1) for p in record.parameters.values()]).tolist(),
        "seen": task.seen,
        "after": kinds(task.net),
        "plugin": [ancestor.__name__ for ancestor in type(plugin).__mro__],
        "calls": getattr(getattr(plugin, "seeds", None), "calls", 0),
        "error": error,
    }
