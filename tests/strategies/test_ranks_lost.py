"""A rank is lost wherever Lightning makes ranks meet: every other rank names it, soon. Both strategies, real processes.

The training steps themselves are in ``test_dropcompute_faults.py`` and ``test_pipelined_bp_faults.py``.
"""

from __future__ import annotations

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
from tests.strategies import models, pipeline_models
from tests.strategies.test_dropcompute_faults import REPORTED_S, TIMEOUT_S, OwnError

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
    strategy, kind, victim, place = case
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
