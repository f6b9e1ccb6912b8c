"""Every method as something that can be given to a Trainer, and small runs that tell whether state was left behind."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_eff.callbacks
import lightning_eff.precision
from lightning_eff.methods import METHODS

BATCHES = 4


@dataclass(frozen=True)
class Subject:
    """One method, with options that make it keep as much state as it can."""

    name: str
    of: str
    options: dict[str, Any] = field(default_factory=dict)
    precision: str | None = None

    @property
    def is_callback(self) -> bool:
        return self.of in lightning_eff.callbacks.__all__

    @property
    def in_bfloat16(self) -> bool:
        return self.of == "BF16Precision"

    def make(self) -> Any:
        """A new callback or plugin."""
        home = lightning_eff.callbacks if self.is_callback else lightning_eff.precision
        return getattr(home, self.of)(**self.options)

    def given(self, instance: Any) -> dict[str, Any]:
        """The Trainer's arguments with it."""
        if self.is_callback:
            return {"callbacks": [instance], "precision": self.precision}
        return {"plugins": [instance]}


_VARIANTS: dict[str, dict[str, Any]] = {
    "luq4": {"hindsight": 0.5},
    "fp8": {"scaling": "tensorwise"},
    "fp8-rowwise": {"scaling": "rowwise"},
    "fp8-delayed": {"scaling": "delayed"},
    "fp8-fit": {"scale": "mean", "gradient_rounding": "stochastic", "refit_every_n_steps": 3},
    "fp6-fit": {"bits": 6, "refit_every_n_steps": 3},
    "flexpoint16": {"weights": "flex16", "weight_rounding": "stochastic"},
    "bf16-sr": {"update": "sr"},
    "bf16-kahan": {"update": "kahan"},
    "bf16-split": {"update": "split"},
}
PRECISIONS = [
    Subject(info.name, info.class_name, _VARIANTS.get(info.name, {}))
    for info in METHODS.values()
    if info.kind == "precision"
]
CALLBACKS = [
    Subject("pruning", "GradientPruning", {"sparsity": 0.6, "warmup_steps": 1, "refit_every_n_steps": 3}),
    Subject("feedback", "GradientPruning", {"sparsity": 0.6, "warmup_steps": 0, "feedback": True}),
    Subject("statistics", "GradientStatistics", {"every_n_steps": 2}),
    Subject("low_precision", "LowPrecision", {"method": "luq4", "options": {"hindsight": 0.5}}),
    Subject("non_finite_guard", "NonFiniteGuard", {"on_nonfinite": "skip"}),
    Subject("fine_tuning", "LUQFineTuning", {"steps": 2}, "luq4"),
]
SUBJECTS = PRECISIONS + CALLBACKS
_LONG = {"fp8", "fp8-rowwise", "fp6-fit", "dfp16", "bf16-emulated", "bf16-kahan", "feedback"}
"""Those that keep no more state than another one does are tried in the long tier."""


def every_subject(such_that: Callable[[Subject], bool] = lambda _: True, *, few: bool = False) -> Any:
    """Try a test with every method, or with those ``such_that``; all but a ``few`` of them in the long tier."""
    quick = {"luq4", "bf16-split", "pruning"} if few else {subject.name for subject in SUBJECTS} - _LONG
    marked = [
        pytest.param(subject, id=subject.name, marks=[] if subject.name in quick else [pytest.mark.long])
        for subject in SUBJECTS
        if such_that(subject)
    ]
    return pytest.mark.parametrize("subject", marked)


class Net(LightningModule):
    """Its middle layer is converted; ``scale`` makes one run's tensors and gradients unlike another's."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.scale, self.lr, self.batch_size = scale, 0.05, 8

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0] * self.scale).float(), batch[1]) * self.scale

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss([batch[0] * 64, batch[1]]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0] * 64)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr / self.scale)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(8 * BATCHES, 6, generator=generator), torch.arange(8 * BATCHES) % 3
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Manual(Net):
    """Steps its optimizers by itself: Lightning's wrappers, or the raw ones."""

    def __init__(self, raw: bool, optimizers: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization, self.raw, self.number = False, raw, optimizers

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        found = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer in found if isinstance(found, list) else [found]:
            optimizer.zero_grad()
            self.manual_backward(self.loss([batch[0] * (1 + 3 * batch_idx), batch[1]]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        made = [torch.optim.SGD(parameters[i :: self.number], lr=self.lr, momentum=0.5) for i in range(self.number)]
        return made if self.number > 1 else made[0]


def trainer(**options: Any) -> Trainer:
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    small = dict(accelerator="cpu", devices=1, max_epochs=1, limit_val_batches=0, num_sanity_val_steps=0)
    return Trainer(**{**quiet, **small, **options})


def fit(runner: Trainer, model: LightningModule, *, seed: int = 3, **options: Any) -> None:
    """Fit from ``seed``, without the tables."""
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        runner.fit(model, **options)


def outcome(model: nn.Module, instance: Any = None) -> tuple[list[Tensor], Any]:
    """Parameters and what the method remembers; equal runs have equal ones."""
    state = instance.state_dict() if instance is not None else {}
    return [p.detach().clone() for p in model.parameters()], copy.deepcopy(state)


def same(first: tuple[list[Tensor], Any], second: tuple[list[Tensor], Any]) -> bool:
    """Whether two outcomes are equal to the bit; NaN, a threshold that was never fitted, is equal to itself."""
    weights = all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    return weights and repr(first[1]) == repr(second[1])


class Stop(Exception):  # noqa: N818
    """What breaks a run off."""


class At(Callback):
    """Calls ``action(trainer, model)`` when ``batch`` training batches have ended."""

    def __init__(self, action: Callable[[Trainer, Any], Any], *, batch: int = 2) -> None:
        self.action, self.batch, self.seen = action, batch, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.batch:
            self.action(trainer, pl_module)
