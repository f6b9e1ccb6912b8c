"""A run, described so that it can be sent to another process, and what is left of it.

``run(plan)`` trains once however often it is asked for: tests that look at one run from different sides share it.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import importlib
import io
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_eff.testing.tasks import ResumableLoader

__all__ = ["STEPS", "Launcher", "Outcome", "Plan", "Refusal", "differences", "imported", "made", "run", "train"]

STEPS = 20
"""Optimizer steps of a whole run, in two epochs."""
EPOCHS = 2
Copy = Literal["", "pickle", "deepcopy", "pickle, used", "deepcopy, used"]
Launcher = Callable[..., list[Any]]
"""``launcher(fn, world_size, *args)``: as :func:`lightning_eff.testing.ranks.run_ranks`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run of the task, with a method or without; everything in it can be pickled.

    Attributes:
        root: package of Lightning whose Trainer runs it.
        kind: where the method goes: ``"strategy"``, ``"callback"`` or ``"precision"``.
        path: ``"module:Class"`` of the method; with ``string`` both empty, the run is plain Lightning's.
        string: what the Trainer is given instead of an object.
        options: arguments of the class.
        trainer: further options of the Trainer. A function stands for what it returns for ``root``.
        task: ``"module:function"``, called with ``root`` and ``task_options``.
        task_options: see there.
        steps: optimizer steps, in two epochs; an even number.
        world: number of processes.
        own_process: whether the run needs processes of its own even if it is one: it forms a process group.
        same_data: all ranks see the same micro-batches.
        seed: of torch, before the run.
        saves: optimizer steps after which a checkpoint ``<step>.ckpt`` is saved.
        resume: path of a checkpoint to go on from.
        copy: how the object is copied before it is used; ``used`` after a first run with it.
        may_fail: return what was raised.
        imports: modules that every process imports first.
    """

    root: str = "lightning.pytorch"
    kind: str = ""
    path: str = ""
    string: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    task: str = "lightning_eff.testing.tasks:task"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    world: int = 1
    own_process: bool = False
    same_data: bool = False
    seed: int = 3
    saves: tuple[int, ...] = ()
    resume: str = ""
    copy: Copy = ""
    may_fail: bool = False
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """An error of a run: its type and those above it, its message, and the optimizer steps made before."""

    kinds: tuple[str, ...]
    message: str
    steps: int


@dataclass
class Outcome:
    """What is left of a run on one rank.

    Attributes:
        weights: parameters and buffers when training had ended.
        layers: name of every layer -> its class, when training had ended.
        checkpoint: what was saved at the end, as ``torch.load(weights_only=True)`` reads it.
        own_state: of a precision plugin, on this rank, at the end.
        losses: of every micro-batch, as Lightning's hooks see it.
        logged: values of every logged key, in the order in which the logger got them (of rank 0).
        warned: messages of the warnings.
        folder: where the checkpoints are.
        refusal: what was raised, if the plan allows for it.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    own_state: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    logged: dict[str, list[float]] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    folder: str = ""
    refusal: Refusal | None = None

    def saved(self, step: int) -> str:
        """Return the path of the checkpoint that was saved after ``step`` optimizer steps."""
        return str(Path(self.folder) / f"{step}.ckpt")


_done: dict[tuple[Launcher, str], list[Outcome]] = {}
_folders: list[str] = []


def run(plan: Plan, launch: Launcher) -> list[Outcome]:
    """Return what every rank of ``plan`` was left with.

    Args:
        plan: what to train.
        launch: starts processes. A plan of one process that needs none of its own runs in this one.
    """
    key = launch, repr(plan)
    if key not in _done:
        folder = tempfile.mkdtemp(prefix="eff-battery-")
        _folders.append(folder)
        alone = plan.world == 1 and not plan.own_process
        _done[key] = [train(0, 1, plan, folder)] if alone else launch(train, plan.world, plan, folder)
    return _done[key]


@atexit.register
def _remove_folders() -> None:
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- on one rank


def train(rank: int, world_size: int, plan: Plan, folder: str) -> Outcome:
    """Run ``plan`` on one rank.

    Args:
        rank: of this process.
        world_size: number of processes.
        plan: what to train.
        folder: where checkpoints go; the same for all ranks.
    """
    for module in plan.imports:
        importlib.import_module(module)
    with warnings.catch_warnings(record=True) as told, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        with torch.random.fork_rng(devices=[]):
            outcome = _refusal_or_fit(rank, world_size, plan, folder)
    outcome.warned = [str(warning.message) for warning in told]
    return outcome


def _refusal_or_fit(rank: int, world_size: int, plan: Plan, folder: str) -> Outcome:
    seen = _Seen()
    if not plan.may_fail:
        return _fit(rank, world_size, plan, folder, seen)
    try:
        return _fit(rank, world_size, plan, folder, seen)
    except Exception as error:  # noqa: BLE001 - which it is, is what the caller wants to know
        kinds = tuple(kind.__name__ for kind in type(error).__mro__)
        return Outcome(weights=seen.weights(), layers=seen.layers(), refusal=Refusal(kinds, str(error), seen.steps))


@dataclass
class _Seen:
    """What is known of a run however it ends."""

    steps: int = 0
    module: Any = None

    def weights(self) -> dict[str, Tensor]:
        if self.module is None:
            return {}
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    def layers(self) -> dict[str, str]:
        if self.module is None:
            return {}
        named = self.module.named_modules()
        return {name: f"{type(layer).__module__}.{type(layer).__qualname__}" for name, layer in named if name}


def imported(path: str) -> Any:
    """Return what ``"module:name"`` stands for."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def made(plan: Plan) -> Any:
    """Return the string of the method, or a new object."""
    return plan.string or imported(plan.path)(**plan.options)


def _fit(rank: int, world_size: int, plan: Plan, folder: str, seen: _Seen) -> Outcome:
    method = made(plan) if plan.path or plan.string else None
    if "used" in plan.copy:
        _train(rank, world_size, replace(plan, copy=""), f"{folder}/used", seen, method)
    if plan.copy:
        method = pickle.loads(pickle.dumps(method)) if "pickle" in plan.copy else copy.deepcopy(method)  # noqa: S301
    return _train(rank, world_size, plan, folder, seen, method)


def _train(rank: int, world_size: int, plan: Plan, folder: str, seen: _Seen, method: Any) -> Outcome:
    pl: Any = importlib.import_module(plan.root)
    outcome = Outcome(folder=folder)
    given = {name: value(plan.root) if _is_function(value) else value for name, value in plan.trainer.items()}
    micro_batches = given.get("accumulate_grad_batches", 1)
    callbacks, place = list(given.pop("callbacks", ())), _place_of(plan, method)
    callbacks += place.pop("callbacks", [])
    options = {
        **dict(accelerator="cpu", devices=world_size, max_epochs=EPOCHS, num_sanity_val_steps=0, log_every_n_steps=1),
        **dict(enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False),
        **dict(limit_val_batches=0, use_distributed_sampler=False),
        **dict(default_root_dir=folder, logger=_logger(plan.root, outcome)),
        **_plain_strategy(plan.root, world_size),
        **given,
        **place,
    }
    torch.manual_seed(plan.seed)
    seen.module = module = imported(plan.task)(plan.root, **plan.task_options)
    trainer = pl.Trainer(callbacks=[*callbacks, _probe(plan.root, outcome, plan.saves, seen)], **options)
    loader = ResumableLoader(plan.steps // EPOCHS * micro_batches, rank=0 if plan.same_data else rank)
    torch.manual_seed(plan.seed)
    trainer.fit(module, loader, ckpt_path=plan.resume or None)
    outcome.weights, outcome.layers = seen.weights(), seen.layers()
    outcome.checkpoint = torch.load(f"{folder}/end.ckpt", weights_only=True)
    return outcome


def _is_function(value: Any) -> bool:
    return callable(value) and hasattr(value, "__code__")


def _place_of(plan: Plan, method: Any) -> dict[str, Any]:
    """Return the Trainer's option that takes the method."""
    if method is None:
        return {}
    if plan.kind == "callback":
        return {"callbacks": [method]}
    if plan.kind == "precision" and not plan.string:
        return {"plugins": [method]}
    return {plan.kind: method}


def _plain_strategy(root: str, world_size: int) -> dict[str, Any]:
    if world_size == 1:
        return {}
    return {"strategy": importlib.import_module(f"{root}.strategies").DDPStrategy(process_group_backend="gloo")}


def _logger(root: str, outcome: Outcome) -> Any:
    """Return a logger that keeps what it is given."""
    base: Any = importlib.import_module(f"{root}.loggers").Logger

    class Kept(base):
        name, version = "kept", 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            for key, value in metrics.items():
                outcome.logged.setdefault(key, []).append(float(value))

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    return Kept()


def _probe(root: str, outcome: Outcome, saves: Iterable[int], seen: _Seen) -> Any:
    """Return a callback that notes losses and saves checkpoints, as a user's would."""
    base: Any = importlib.import_module(f"{root}.callbacks").Callback
    waiting = set(saves)

    class Probe(base):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            outcome.losses.append(float("nan") if loss is None else float(loss))
            seen.steps = int(trainer.global_step)
            if seen.steps in waiting:
                waiting.remove(seen.steps)
                trainer.save_checkpoint(outcome.saved(seen.steps))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            outcome.own_state = dict(trainer.precision_plugin.state_dict())
            trainer.save_checkpoint(f"{outcome.folder}/end.ckpt")

    return Probe()


# ------------------------------------------------------------------------------------------------- comparing


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Return where two values differ by as little as a bit; NaN is NaN.

    Args:
        found: tensors, numbers, and mappings and lists of them.
        wanted: what it is compared with.
        where: its name, for the result.
    """
    if isinstance(found, Tensor) and isinstance(wanted, Tensor):
        same = found.dtype == wanted.dtype and found.shape == wanted.shape and _same_bits(found, wanted)
        return [] if same else [f"{where}: tensors differ"]
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        keys = [f"{where}: keys {sorted(map(str, found))} and {sorted(map(str, wanted))}"]
        inner = (differences(found[key], wanted[key], f"{where}[{key!r}]") for key in found if key in wanted)
        return (keys if set(found) != set(wanted) else []) + [line for lines in inner for line in lines]
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        if len(found) != len(wanted):
            return [f"{where}: lengths {len(found)} and {len(wanted)}"]
        pairs = enumerate(zip(found, wanted, strict=True))
        return [line for i, (one, other) in pairs for line in differences(one, other, f"{where}[{i}]")]
    if isinstance(found, float) and isinstance(wanted, float):
        return [] if found.hex() == wanted.hex() else [f"{where}: {found!r} and {wanted!r}"]
    return [] if type(found) is type(wanted) and found == wanted else [f"{where}: {found!r} and {wanted!r}"]


def _same_bits(found: Tensor, wanted: Tensor) -> bool:
    def raw(tensor: Tensor) -> Tensor:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)

    return torch.equal(raw(found), raw(wanted))
