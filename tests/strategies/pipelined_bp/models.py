"""A small classifier with layers to cut, and what every test of ``strategy="pipelined_bp"`` does with it."""

from __future__ import annotations

import contextlib
import importlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.harness import FIXED_SEED, run_ranks, seed_everything
from tests.strategies.models import NAMESPACES

Plan = dict[str, Any]

FEATURES, WIDTH, CLASSES, LAYERS, BATCH = 6, 8, 3, 6, 4
SAMPLES = 38
"""10 micro-batches, the last of them of 2 samples."""
STEPS = 20
"""Updates of :func:`fit` unless told otherwise: two epochs."""
EPOCH = STEPS // 2
CUTS = {1: [], 2: ["net.3"], 3: ["net.2", "net.4"], 4: ["net.2", "net.3", "net.5"]}
"""Number of stages -> layers at which stages begin."""


def data(samples: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype), (x.sum(1) > 0).long() + (x[:, 0] > 1).long()


def loader(samples: int = SAMPLES, *, seed: int = 1, dtype: torch.dtype = torch.float32, shuffle: bool = True) -> Any:
    rows = torch.utils.data.TensorDataset(*data(samples, seed, dtype))
    return torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=shuffle)


def val_loader() -> Any:
    """The validation set: 10 samples of another seed."""
    return loader(10, seed=2, shuffle=False)


# ------------------------------------------------------------------------------------------------------- the model


class Layer(nn.Module):
    """A residual layer; ``side`` is what a walked stack gives to every one."""

    def __init__(self, norm: str | None, dropout: float) -> None:
        super().__init__()
        norms = {None: nn.Identity, "batch": lambda: nn.BatchNorm1d(WIDTH), "group": lambda: nn.GroupNorm(2, WIDTH)}
        self.norm, self.linear, self.dropout = norms[norm](), nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x: Tensor, side: Tensor | float = 0.0) -> Tensor:
        out: Tensor = x + self.dropout(self.linear(self.norm(x)).tanh()) + side
        return out


class Masked(Layer):
    """Takes and returns a tuple, whose mask needs no gradient."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, mask = pair
        return super().forward(x) * mask, mask


class Net(nn.Module):
    """``pre``, the stack ``net``, ``head``.

    Args:
        kind: ``"sequential"``; ``"list"``, a ModuleList that is walked with a side argument that needs a gradient; or
            ``"tuple"``, an nn.Sequential between whose layers pairs pass.
        norm: ``"batch"``, ``"group"`` or None.
        dropout: in every layer.
        layers: how many.
    """

    def __init__(
        self, kind: str = "sequential", norm: str | None = None, dropout: float = 0.0, layers: int = LAYERS
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.pre, self.head = kind, nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)
        stack = [(Masked if kind == "tuple" else Layer)(norm, dropout) for _ in range(layers)]
        self.net: Any = nn.ModuleList(stack) if kind == "list" else nn.Sequential(*stack)
        if kind == "list":
            self.side = nn.Linear(FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pre(x)
        if self.kind == "list":
            side = self.side(x).tanh()
            for layer in self.net:
                h = layer(h, side)
        elif self.kind == "tuple":
            h, _ = self.net((h, (x[:, :1] > -1)))
        else:
            h = self.net(h)
        return self.head(h)  # type: ignore[no-any-return]


def optimizer_of(name: str, net: nn.Module) -> torch.optim.Optimizer:
    """What a test calls ``name``; the head is a group with a learning rate of its own in ``adamw``."""
    if name == "sgd":
        return torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-2)
    if name == "adam":
        return torch.optim.Adam(net.parameters(), lr=3e-3)
    head = {id(p) for p in net.head.parameters()}  # type: ignore[union-attr]
    rest = [p for p in net.parameters() if id(p) not in head]
    groups = [{"params": rest}, {"params": list(net.head.parameters()), "lr": 1e-2}]  # type: ignore[union-attr]
    return torch.optim.AdamW(groups, lr=3e-3, weight_decay=1e-2)


def schedule_of(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What of ``configure_optimizers`` makes learning rates change per step, per epoch or by a metric."""
    schedules = torch.optim.lr_scheduler
    if name == "step":
        return {"scheduler": schedules.LambdaLR(optimizer, lambda step: 0.95**step), "interval": "step"}
    if name == "epoch":
        return {"scheduler": schedules.StepLR(optimizer, 1, gamma=0.5), "interval": "epoch"}
    # A threshold of 0.5 that no epoch's improvement reaches: it reduces at every end of an epoch but the first.
    plateau = schedules.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5, threshold_mode="abs")
    return {"scheduler": plateau, "monitor": {"plateau": "val_loss", "plateau of the training loss": "loss"}[name]}


def task(
    root: str = NAMESPACES[0],
    *,
    optimizer: str = "sgd",
    schedule: str | None = "step",
    dtype: torch.dtype = torch.float32,
    hooks: dict[str, Callable[..., Any]] | None = None,
    **net: Any,
) -> Any:
    """A LightningModule around :class:`Net`; ``hooks`` become methods.

    It records ``losses`` (of every micro-batch, NaN where there was none; of meaning on rank 0, whose is the last
    stage), ``validated`` (every ``val_loss``) and ``rates`` (learning rates in every real step of the optimizer).
    """
    pl = importlib.import_module(root)

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            inner = Net(**net).to(dtype)
            self.run = [inner]  # its children are this module's own: names in a state_dict have no prefix
            for name, child in inner.named_children():
                self.add_module(name, child)
            self.losses: list[float] = []
            self.validated: list[float] = []
            self.rates: list[list[float]] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.run[0](x)  # type: ignore[no-any-return]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

        def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
            self.losses.append(float(outputs["loss"]) if outputs else float("nan"))

        def on_validation_end(self) -> None:
            self.validated.append(float(self.trainer.callback_metrics["val_loss"]))

        def configure_optimizers(self) -> Any:
            made = optimizer_of(optimizer, self)
            # The strategy puts other groups in the optimizer's place while it steps: these are the user's.
            rates, groups = self.rates, [made.param_groups]
            made.register_load_state_dict_post_hook(lambda o: groups.__setitem__(0, o.param_groups))
            made.register_step_pre_hook(lambda *_: rates.append([float(group["lr"]) for group in groups[0]]))
            return {"optimizer": made, **({"lr_scheduler": schedule_of(schedule, made)} if schedule else {})}

    return type("Task", (Task,), hooks or {})()


# ------------------------------------------------------------------------------------------------------- a run


def strategy(root: str = NAMESPACES[0], **options: Any) -> Any:
    """The strategy of a namespace; draws no picture."""
    shells = {"lightning.pytorch": "lightning_eff.strategies", "pytorch_lightning": "lightning_eff.pytorch_lightning"}
    given = {"process_group_backend": "gloo", "schedule_picture": False, "module": "net", "timeout_s": 30.0, **options}
    return importlib.import_module(shells[root]).PipelinedBPStrategy(**given)


def trainer(used: Any, root: str = NAMESPACES[0], **options: Any) -> Any:
    """A quiet Trainer of two epochs on one process."""
    pl = importlib.import_module(root)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    small = dict(accelerator="cpu", devices=1, max_epochs=2, num_sanity_val_steps=0, log_every_n_steps=5)
    return pl.Trainer(strategy=used, **{"val_check_interval": 0.5, **quiet, **small, **options})


@dataclass
class Outcome:
    """What is left of a run. The fields that :func:`differences` compares have to be equal to the last bit.

    Attributes:
        state: parameters and buffers.
        losses: of every micro-batch.
        validated: every validation's loss.
        rates: learning rates of every update.
        moments: the optimizer's state on this rank, by the name of the parameter.
        generators: states of torch's, numpy's and Python's.
        trainer: what the Trainer counted and logged.
        figures: the strategy's own, as last logged.
        warnings: that the run gave, as text.
        extra: what a test's hooks put into ``self.extra``.
    """

    state: dict[str, Tensor]
    losses: list[float]
    validated: list[float]
    rates: list[list[float]]
    moments: dict[str, dict[str, Any]]
    generators: tuple[Any, ...]
    trainer: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    extra: Any = None


def outcome_of(model: Any, run: Any) -> Outcome:
    """Of a Trainer that has fitted."""
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {names[id(p)]: dict(values) for p, values in run.optimizers[0].state.items()}
    counted = {
        "global_step": run.global_step,
        "lr": [[group["lr"] for group in o.param_groups] for o in run.optimizers],
        "logged": {k: float(v) for k, v in run.callback_metrics.items()},
    }
    return Outcome(
        state={k: v.detach().clone() for k, v in model.state_dict().items()},
        losses=model.losses,
        validated=model.validated,
        rates=model.rates,
        moments=moments,
        generators=(torch.get_rng_state(), np.random.get_state(), random.getstate()),  # noqa: NPY002 - the global one
        trainer=counted,
        figures=dict(getattr(run.strategy, "metrics", {})),
        extra=getattr(model, "extra", None),
    )


def fit(
    rank: int,
    world: int,
    plan: Plan | None,
    model: Plan | None = None,
    options: Plan | None = None,
    *,
    root: str = NAMESPACES[0],
    samples: int = SAMPLES,
    shuffle: bool = True,
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Outcome:
    """Fit on every rank of :func:`tests.harness.run_ranks` (with ``init_group=False``).

    Args:
        rank: of this process.
        world: number of processes.
        plan: options of the strategy; None is plain Lightning.
        model: options of :func:`task`.
        options: of the Trainer.
        root: whose Trainer.
        samples: of an epoch.
        shuffle: whether the loader draws their order, from torch's global generator.
        within: a context to run in, to put something wrong into the package.
    """
    given = model or {}
    dtype = given.get("dtype", torch.float32)
    with within(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        built = task(root, **given)
        run = trainer("auto" if plan is None else strategy(root, **plan), root, devices=world, **(options or {}))
        seed_everything(FIXED_SEED)  # only now: to import Lightning draws from Python's generator
        run.fit(built, loader(samples, dtype=dtype, shuffle=shuffle), loader(10, seed=2, dtype=dtype, shuffle=False))
        outcome = outcome_of(built, run)
    outcome.warnings = [str(warning.message) for warning in told]
    return outcome


def bits(value: Any) -> Any:
    """Equal exactly where the values are equal to the last bit (NaN to NaN)."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1).contiguous()
        return value.dtype, tuple(value.shape), flat.view(torch.uint8).tolist() if flat.numel() else []
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {k: bits(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [bits(v) for v in value]
    return value.hex() if isinstance(value, float) else value


def differences(real: list[Outcome], other: Outcome) -> list[str]:
    """Where a run over several ranks differs from one in one process.

    Every rank has the whole model at the end; what the optimizer keeps is where it is trained.
    """
    found = []
    for rank, mine in enumerate(real):
        checks = {
            **{name: (value, other.state.get(name)) for name, value in mine.state.items()},
            **{f"state of {name}": (value, other.moments.get(name)) for name, value in mine.moments.items()},
            "names": (list(mine.state), list(other.state)),
            "validated": (mine.validated, other.validated),
            "rates": (mine.rates, other.rates),
            "generators": (mine.generators, other.generators),
            "counted": (mine.trainer["global_step"], other.trainer["global_step"]),
            "lr": (mine.trainer["lr"], other.trainer["lr"]),
            "logged val_loss": tuple(run.trainer["logged"].get("val_loss") for run in (mine, other)),
        }
        if rank == 0:  # the last stage's
            checks["losses"] = (mine.losses, other.losses)
            checks["logged"] = (mine.trainer["logged"], other.trainer["logged"])
        found += [f"rank {rank}: {name}" for name, (a, b) in checks.items() if bits(a) != bits(b)]
    trained = [name for mine in real for name in mine.moments]
    if sorted(trained) != sorted(other.moments):
        found.append(f"parameters trained: {sorted(trained)}")
    return found


def emulated(plan: Plan | None, model: Plan | None = None, options: Plan | None = None, **given: Any) -> Outcome:
    """:func:`fit` in one process."""
    return run_ranks(fit, 1, plan, model, options, init_group=False, **given)[0]


def pipelined(
    ranks: int, plan: Plan, model: Plan | None = None, options: Plan | None = None, **given: Any
) -> list[Outcome]:
    """:func:`fit` over several."""
    return run_ranks(fit, ranks, plan, model, options, init_group=False, **given)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """As pytest's monkeypatch, in a rank."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
