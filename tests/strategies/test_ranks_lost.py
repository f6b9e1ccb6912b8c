"""A rank is lost wherever Lightning makes ranks meet: every other rank names it, soon. Both strategies, real processes.

The training steps themselves are in ``dropcompute/test_faults.py`` and ``pipelined_bp/test_faults.py``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.errors import RankLostError
from tests.harness import RanksFailedError, run_ranks
from tests.strategies import models
from tests.strategies.faults import REPORTED_S, TIMEOUT_S, OwnError
from tests.strategies.pipelined_bp import models as pipeline_models

LONG = pytest.mark.long
STRATEGIES = ("dropcompute", "pipelined_bp")
KINDS = ("die", "exit", "raise", "hang")
PLACES = ("setup", "sanity check", "validation", "metric", "checkpoint", "logger", "epoch end", "train end")
"""Where the victim fails: in the hook of that name, and the others meet somewhere later."""
WAITED_FOR = {"hang"}


# ---------------------------------------------------------------------------------------------------- a run that fails


def _fail(folder: Path, kind: str) -> None:
    """Once: the first rank to come here writes when that was."""
    if (folder / "fault").exists():
        return
    (folder / "fault").write_text(str(time.time()))
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(3)
    if kind == "raise":
        raise OwnError("of the user's code")
    while len(list(folder.glob("seen-*"))) < int(os.environ["WORLD_SIZE"]) - 1:  # so that the pool need not kill it
        time.sleep(0.02)


def _hooks(reach: Callable[[str], None], strategy: str) -> dict[str, Any]:
    """Methods of a module that say where they are; ``metric`` is one that torchmetrics gathers by itself."""

    def setup(self: Any, stage: str) -> None:
        reach("setup")

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        reach("sanity check" if self.trainer.sanity_checking else "validation")
        if not self.trainer.sanity_checking:
            reach("metric")
            self.seen.update(batch[0])
            self.log("seen", self.seen)

    def on_save_checkpoint(self: Any, checkpoint: Any) -> None:
        reach("checkpoint")

    def on_train_epoch_end(self: Any) -> None:
        reach("epoch end")

    def on_train_end(self: Any) -> None:
        reach("train end")

    return {
        hook.__name__: hook for hook in (setup, validation_step, on_save_checkpoint, on_train_epoch_end, on_train_end)
    }


def _logger(reach: Callable[[str], None]) -> Any:
    from lightning.pytorch.loggers.logger import Logger
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    class Failing(Logger):
        name, version = "failing", 0

        @rank_zero_only
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            reach("logger")

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    return Failing()


class Slow(torch.utils.data.Dataset[tuple[Tensor, ...]]):
    """Rows of a dataset, from a loader worker that ``fails`` in one of them."""

    def __init__(self, rows: Any, fails: Callable[[], None] | None) -> None:
        self.rows, self.fails = rows, fails

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        if self.fails is not None and i == 12:
            self.fails()
        row: tuple[Tensor, ...] = self.rows[i]
        return row


def _parts(strategy: str, rank: int, world: int, hooks: dict[str, Any], **options: Any) -> tuple[Any, Any, Any, Any]:
    """Strategy, module, loaders of training and validation."""
    import torchmetrics

    if strategy == "dropcompute":
        model = models.task(**hooks)
        loaders = (models.loader(rank, world, 64), models.loader(rank, world, 16))
        used = models.ours(**options)
    else:
        model = pipeline_models.task(hooks=hooks)
        model.on_validation_end = lambda: None
        loaders = (pipeline_models.loader(), pipeline_models.loader(8, seed=2, shuffle=False))
        used = pipeline_models.strategy(stages=pipeline_models.CUTS[world], **options)
    model.seen = torchmetrics.MeanMetric()
    return used, model, *loaders


def _run(rank: int, world: int, folder: str, strategy: str, kind: str, victim: int, place: str) -> None:
    """Fit, then validate; ``victim`` fails. Every other rank writes when it heard of it."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    def reach(here: str) -> None:
        if (rank, here) == (victim, place):
            _fail(Path(folder), kind)

    timeout_s = TIMEOUT_S if kind in WAITED_FOR else 60.0
    used, model, train, val = _parts(strategy, rank, world, _hooks(reach, strategy), timeout_s=timeout_s)
    if place == "loader worker":
        fails = (lambda: _fail(Path(folder), "die")) if rank == victim else None
        train = torch.utils.data.DataLoader(
            Slow(train.dataset, fails), models.BATCH, num_workers=1, multiprocessing_context="fork"
        )
    if place == "loader workers live on":
        val = torch.utils.data.DataLoader(val.dataset, models.BATCH, num_workers=1, multiprocessing_context="fork")
        place = "validation"
    runner = Trainer(
        strategy=used, accelerator="cpu", devices=world, max_epochs=1, log_every_n_steps=1, logger=_logger(reach),
        callbacks=[ModelCheckpoint(folder, save_last=True)], use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    try:
        if place == "the script":
            reach("the script")
        runner.fit(model, train, val)
        runner.validate(model, val, verbose=False)
    except BaseException:
        if rank != victim:
            (Path(folder) / f"seen-{rank}").write_text(str(time.time()))
        raise


def _import_everything(rank: int, world: int, folder: str) -> None:
    import torchmetrics  # noqa: F401

    models.trainer("auto", devices=1, fast_dev_run=True).fit(models.task(), models.loader(0, 1, models.BATCH))
    torch.utils.data.DataLoader(models.data(4))


def _lose(folder: Path, strategy: str, kind: str, victim: int, place: str, world: int = 2) -> RanksFailedError:
    """Run it; check when the other ranks heard of it and that each names the victim."""
    if kind in WAITED_FOR:
        run_ranks(_import_everything, world, str(folder))
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(_run, world, str(folder), strategy, kind, victim, place, init_group=False, timeout_s=40.0)
    error = caught.value
    happened = float((folder / "fault").read_text())
    seen = {rank: float((folder / f"seen-{rank}").read_text()) - happened for rank in range(world) if rank != victim}
    allowed_s = REPORTED_S + (TIMEOUT_S if kind in WAITED_FOR else 0.0)
    for rank, after_s in seen.items():
        assert error.failures[rank] == "RankLostError", error
        assert after_s < allowed_s, error
        assert f"rank {victim}" in _told(error, rank).replace("Rank", "rank")
    return error


def _told(error: RanksFailedError, rank: int) -> str:
    """The message of the RankLostError on ``rank``, without what it says of itself."""
    story = str(error).partition(f"--- rank {rank}: RankLostError")[2].partition("\n--- rank")[0]
    line = [line for line in story.splitlines() if "RankLostError: " in line][-1]
    return line.replace(f"where rank {rank} was", "here")


# ---------------------------------------------------------------------------------------------------- the table

Case = tuple[str, str, int, str]
SOME: list[Case] = [
    ("dropcompute", "raise", 1, "validation"),
    ("dropcompute", "hang", 1, "metric"),
    ("dropcompute", "die", 1, "loader workers live on"),
    ("pipelined_bp", "raise", 0, "logger"),
]
EVERY: list[Case] = [
    (strategy, kind, victim, place)
    for strategy in STRATEGIES
    for place in PLACES
    for kind in KINDS
    for victim in ((0,) if place == "logger" else (0, 1))
]
EVERY += [(strategy, "die", 1, "loader workers live on") for strategy in STRATEGIES]


@pytest.mark.parametrize("case", [*SOME, *(pytest.param(c, marks=LONG) for c in EVERY if c not in SOME)], ids=str)
def test_a_lost_rank_is_named_wherever_ranks_meet(tmp_path: Path, case: Case) -> None:
    _, kind, victim, _ = case
    error = _lose(tmp_path, *case)
    told = _told(error, 1 - victim)
    if kind == "raise":
        assert error.failures[victim] == "OwnError"
        assert "which raised OwnError: of the user's code" in told
    if kind in ("die", "exit"):
        assert error.failures[victim] == "died"
        assert "whose process has ended" in told or "Rank 0 has ended" in told
    if kind == "hang":
        assert f"rank {victim} (last seen at" in told
        assert ", alive, and there for" in told


# ---------------------------------------------------------------------------------------------------- loader workers


@pytest.mark.parametrize(
    ("strategy", "victim"),
    [
        ("dropcompute", 1),
        *(pytest.param(s, v, marks=LONG) for s in STRATEGIES for v in (0, 1) if (s, v) != (STRATEGIES[0], 1)),
    ],
)
def test_a_killed_loader_worker_is_told_with_its_rank_on_every_rank(tmp_path: Path, strategy: str, victim: int) -> None:
    error = _lose(tmp_path, strategy, "die", victim, "loader worker")
    assert error.failures == {0: "RankLostError", 1: "RankLostError"}
    assert "which lost a loader worker: " in _told(error, 1 - victim)
    assert f"rank {victim} lost a loader worker (" in str(error)


# ---------------------------------------------------------------------------------------------------- the start


def _start(rank: int, world: int, folder: str, strategy: str, kind: str, victim: int) -> None:
    used, model, train, _ = _parts(strategy, rank, world, {}, timeout_s=TIMEOUT_S)
    began = time.time()
    if rank == victim:
        _fail(Path(folder), kind)
    try:
        models.trainer(used, devices=world).fit(model, train)
    except BaseException:
        (Path(folder) / f"seen-{rank}").write_text(str(time.time() - began))
        raise


@pytest.mark.parametrize(
    ("strategy", "victim"),
    [
        ("dropcompute", 1),
        *(pytest.param(*case, marks=LONG) for case in ((STRATEGIES[0], 0), (STRATEGIES[1], 0), (STRATEGIES[1], 1))),
    ],
)
def test_a_rank_that_never_comes_is_named_after_the_timeout_of_the_start(
    tmp_path: Path, strategy: str, victim: int
) -> None:
    run_ranks(_import_everything, 2, str(tmp_path))
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(_start, 2, str(tmp_path), strategy, "hang", victim, init_group=False, timeout_s=30.0)
    assert TIMEOUT_S * 0.9 < float((tmp_path / f"seen-{1 - victim}").read_text()) < TIMEOUT_S + REPORTED_S
    told = _told(caught.value, 1 - victim)
    assert "Missing: rank 1 (never seen)" in told if victim else "rank 0 is missing" in told
    assert f"timeout_s={TIMEOUT_S:g}" in told
    assert "limits the start as well" in told


# ---------------------------------------------------------------------------------------------------- three ranks


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=LONG) for kind in ("die", "hang", "raise")])
def test_who_does_not_wait_for_the_lost_rank_itself_names_it_as_well(tmp_path: Path, kind: str) -> None:
    """Connections are closed by whoever has given up, so that the others need not wait for the timeout."""
    error = _lose(tmp_path, "dropcompute", kind, 1, "metric", world=3)
    for rank in (0, 2):
        assert "Missing: rank 1 (last seen at" in _told(error, rank), _told(error, rank)


# ---------------------------------------------------------------------------------------------------- no faults

WAIT_S = 1.2
"""A rank is late by that, which is less than the timeout; and longer than anything a roll call waits for."""


def _waits(rank: int, world: int, folder: str, strategy: str) -> int:
    """Rank 0 takes long to write a checkpoint and to log, rank 1 to validate and to load."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    late = {("checkpoint", 0), ("logger", 0), ("validation", 1), ("setup", 1)}

    def reach(here: str) -> None:
        if (here, rank) in late:
            late.remove((here, rank))
            time.sleep(WAIT_S)

    used, model, train, val = _parts(strategy, rank, world, _hooks(reach, strategy), timeout_s=20.0)
    runner = Trainer(
        strategy=used, accelerator="cpu", devices=world, max_epochs=1, log_every_n_steps=1, logger=_logger(reach),
        callbacks=[ModelCheckpoint(folder)], use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    runner.fit(model, train, val)
    return len([place for place, who in late if who == rank])


@pytest.mark.parametrize(
    "strategy", [pytest.param("dropcompute", marks=LONG), pytest.param("pipelined_bp", marks=LONG)]
)
def test_nobody_is_accused_of_what_takes_long(tmp_path: Path, strategy: str) -> None:
    assert run_ranks(_waits, 2, str(tmp_path), strategy, init_group=False) == [0, 0]


def _again(rank: int, world: int, strategy: str) -> list[float]:
    """A fit that fails on rank 1 alone, and one after it in the same processes: over a group formed anew."""
    done = []
    for fails in (True, False, False):

        def on_train_batch_start(self: Any, batch: Any, batch_idx: int, fails: bool = fails) -> None:
            if fails and rank == 1 and batch_idx == 3:
                raise OwnError("of the user's code")

        used, model, train, val = _parts(strategy, rank, world, {"on_train_batch_start": on_train_batch_start})
        with pytest.raises((OwnError,) if rank == 1 else (RankLostError,)) if fails else contextlib.nullcontext():
            models.trainer(used, devices=world, val_check_interval=1.0).fit(model, train, val)
        if not fails:
            done.append(float(models.parameters_of(model).sum()))
    return done


@pytest.mark.parametrize("strategy", ["dropcompute", pytest.param("pipelined_bp", marks=LONG)])
def test_ranks_that_caught_the_error_train_together_again(strategy: str) -> None:
    first, second = run_ranks(_again, 2, strategy, init_group=False)
    assert first == second
    assert first[0] == first[1]
