"""strategy="dropcompute" when a rank dies, raises, hangs or computes NaN: every rank ends with an error, soon."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.errors import EffWarning, NonFiniteGradientError
from tests.harness import RanksFailedError, run_ranks
from tests.integration.conftest import run_python
from tests.strategies.dropcompute.plans import PLAN, SAMPLES, M, planned, reference
from tests.strategies.faults import ENDED_S, FAULTS, REPORTED_S, TIMEOUT_S, WAITED_FOR
from tests.strategies.models import BATCH, loader, loss_of, parameters_of, task, trainer
from tests.strategies.processes import no_orphans

FIRST, MIDDLE, LAST = 0, 2 * M + 1, 6 * M - 1
"""Micro-batches at which a fault happens: of step 0, inside a window, the last of the last step."""


def _import_everything(rank: int, world: int) -> None:
    trainer("auto", devices=1, fast_dev_run=True).fit(task(), loader(0, 1, BATCH))


def _fit_with_fault(rank: int, world: int, folder: str, kind: str, victim: int, at: int) -> None:
    """Train; ``victim`` fails in micro-batch ``at``. Each rank writes when that was, or when it heard of it."""
    from lightning_eff.strategies import DropComputeStrategy

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if rank == victim and batch_idx == at:
            (Path(folder) / "fault").write_text(str(time.time()))
            FAULTS[kind](Path(folder))
        return loss_of(self.net, batch[0])

    timeout_s = TIMEOUT_S if kind in WAITED_FOR else 60.0
    strategy = DropComputeStrategy(threshold=math.inf, process_group_backend="gloo", timeout_s=timeout_s)
    runner = trainer(strategy, accumulate_grad_batches=M)
    try:
        runner.fit(task(training_step=training_step), loader(rank, world, SAMPLES))
    except BaseException:
        if rank != victim:
            (Path(folder) / "seen").write_text(str(time.time()))
        raise


def _fail(folder: Path, kind: str, victim: int, at: int) -> tuple[RanksFailedError, float]:
    """What both ranks reported, and seconds from the fault to the error on the rank without a fault."""
    if kind in WAITED_FOR:
        run_ranks(_import_everything, 2)
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(_fit_with_fault, 2, str(folder), kind, victim, at, init_group=False, timeout_s=30.0)
    times = [float((folder / name).read_text()) for name in ("fault", "seen")]
    return caught.value, times[1] - times[0]


def _told(error: RanksFailedError, rank: int) -> str:
    """The message of the RankLostError on ``rank``."""
    lines = [line for line in str(error).splitlines() if "RankLostError: " in line]
    (own,) = (line for line in lines if f"where rank {rank} was" in line)
    return own


BEFORE = {FIRST: "a reduction", MIDDLE: "optimizer step 1", LAST: "optimizer step 4"}
"""Fault -> where the rank was last."""


LONG = pytest.mark.long


CASES = [
    pytest.param("raise", 0, FIRST),
    pytest.param("raise", 1, MIDDLE),
    pytest.param("die", 1, MIDDLE),
    *(
        pytest.param(kind, victim, at, marks=LONG)
        for kind in ("raise", "die")
        for victim in (0, 1)
        for at in (FIRST, MIDDLE, LAST)
        if (kind, victim, at) not in {("raise", 0, FIRST), ("raise", 1, MIDDLE), ("die", 1, MIDDLE)}
    ),
]


@pytest.mark.parametrize(("kind", "victim", "at"), CASES)
def test_a_rank_that_fails_ends_the_other(tmp_path: Path, kind: str, victim: int, at: int) -> None:
    error, after_s = _fail(tmp_path, kind, victim, at)
    assert error.failures[victim] == ("died" if kind == "die" else "OwnError")
    assert error.failures[1 - victim] == "RankLostError"
    assert after_s < REPORTED_S
    if kind == "die":
        assert "exit code -9" in str(error)
    told = _told(error, 1 - victim)
    assert f"at optimizer step {at // M}, " in told
    if victim == 1:
        assert f"Missing: rank 1 (last seen at {BEFORE[at]})" in told
    else:  # the store may be gone with it
        assert "Rank 0 has ended or cannot be reached" in told or f"Missing: rank 0 (last seen at {BEFORE[at]})" in told
    assert "The above exception was the direct cause" in str(error)


@pytest.mark.parametrize(
    ("victim", "at"),
    [pytest.param(1, MIDDLE), *(pytest.param(v, at, marks=LONG) for v, at in ((0, FIRST), (0, MIDDLE), (1, LAST)))],
)
def test_a_rank_that_hangs_ends_the_other_after_the_timeout(tmp_path: Path, victim: int, at: int) -> None:
    error, after_s = _fail(tmp_path, "hang", victim, at)
    assert TIMEOUT_S * 0.5 < after_s < TIMEOUT_S + REPORTED_S
    assert error.failures[1 - victim] == "RankLostError"
    assert "imed out" in str(error)
    assert f"Missing: rank {victim} (last seen at {BEFORE[at]})" in _told(error, 1 - victim)


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_process_is_named_though_it_may_keep_the_store(tmp_path: Path, victim: int) -> None:
    error, after_s = _fail(tmp_path, "freeze", victim, MIDDLE)
    assert TIMEOUT_S * 0.5 < after_s < TIMEOUT_S + REPORTED_S
    assert error.failures == {victim: "hung", 1 - victim: "RankLostError"}
    expected = "Missing: rank 1 (last seen at optimizer step 1)" if victim else "Rank 0 hangs or cannot be reached"
    assert expected in _told(error, 1 - victim)


def _poisoned(rank: int, world: int, victim: int, at: int, value: float, options: dict[str, Any]) -> dict[str, Any]:
    import warnings

    before: list[Tensor] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx % M == 0:
            before.append(parameters_of(self))
        return loss_of(self.net, batch[0]) * (value if rank == victim and batch_idx == at else 1.0)

    model = task(training_step=training_step)
    strategy = planned(options.pop("plan", [[M] * 6, [M] * 6]), **options)
    told = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer(strategy, accumulate_grad_batches=M).fit(model, loader(rank, world, SAMPLES))
        except NonFiniteGradientError as error:
            told = str(error)
    return {
        "told": told,
        "warned": [str(w.message) for w in caught if issubclass(w.category, EffWarning)],
        "unchanged": torch.equal(parameters_of(model), before[-1]),
        "finite": bool(parameters_of(model).isfinite().all()),
        "weights": parameters_of(model.net),
    }


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("at", "value"), [(FIRST, math.nan), (MIDDLE, math.inf), (LAST, math.nan)])
def test_a_broken_gradient_stops_both_ranks_before_a_parameter_changes(victim: int, at: int, value: float) -> None:
    for result in run_ranks(_poisoned, 2, victim, at, value, {}, init_group=False):
        assert f"optimizer step {at // M} (from rank {victim}, micro-batch {at % M})" in result["told"]
        assert "net." in result["told"]
        assert result["unchanged"]
        assert result["finite"]


def test_a_user_may_go_on_with_it() -> None:
    """As stock DistributedDataParallel does, but with a warning in every broken step, on every rank."""
    for result in run_ranks(_poisoned, 2, 1, MIDDLE, math.nan, {"on_nonfinite": "warn"}, init_group=False):
        assert not result["told"]
        assert not result["finite"]
        assert len(result["warned"]) == 4, "steps 2 to 5"
        assert "from rank 1" in result["warned"][0]


def test_a_broken_micro_batch_that_is_dropped_breaks_nothing() -> None:
    plan = [[M] * 6, [M, M, 1, M, M, M]]
    first, second = run_ranks(_poisoned, 2, 1, MIDDLE, math.nan, {"plan": plan}, init_group=False)
    for result in (first, second):
        assert not result["told"]
        assert result["finite"]
    assert (first["weights"] - reference(plan)).norm() <= 2e-6 * reference(plan).norm()


def _with_nothing(rank: int, world: int, plan: list[list[int]]) -> tuple[Tensor, int]:
    """The strategy computes one micro-batch at least; its all-reduce does not rely on it."""
    strategy = planned(plan)
    strategy.min_micro_batches = 0
    model = task(training_step=lambda self, batch, batch_idx: loss_of(self.net, batch[0]))
    runner = trainer(strategy, accumulate_grad_batches=M)
    runner.fit(model, loader(rank, world, SAMPLES))
    return parameters_of(model.net), runner.global_step


@pytest.mark.parametrize("plan", [[PLAN[0], [0] * 6], [[0, 4, 2, 0, 4, 1], [3, 4, 0, 2, 1, 0]]], ids=["rank", "turns"])
def test_a_rank_without_a_micro_batch_holds_nobody_up(plan: list[list[int]]) -> None:
    (first, steps), (second, _) = run_ranks(_with_nothing, 2, plan, init_group=False)
    assert steps == 6
    assert torch.equal(first, second)
    assert (first - reference(plan)).norm() <= 2e-6 * reference(plan).norm()


def test_a_step_in_which_no_rank_computed_changes_nothing() -> None:
    plan = [[4, 0, 3, 2, 4, 1], [2, 0, 1, 4, 4, 3]]
    (first, steps), (second, _) = run_ranks(_with_nothing, 2, plan, init_group=False)
    assert steps == 6
    assert torch.equal(first, second)
    assert first.isfinite().all()


def _raise_while_saving(rank: int, world: int, folder: str) -> None:
    from lightning.pytorch.callbacks import Callback

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                if rank == 0:
                    (Path(folder) / "fault").write_text(str(time.time()))
                    trainer.strategy.checkpoint_io.save_checkpoint = lambda *_, **__: FAULTS["raise"](Path(folder))
                trainer.save_checkpoint(Path(folder) / "broken.ckpt")

    try:
        runner = trainer(planned([[M] * 6] * 2), accumulate_grad_batches=M, callbacks=[Save()])
        runner.fit(task(), loader(rank, world, SAMPLES))
    except BaseException:
        if rank == 1:
            (Path(folder) / "seen").write_text(str(time.time()))
        raise


def test_a_checkpoint_that_cannot_be_written_ends_both(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(_raise_while_saving, 2, str(tmp_path), init_group=False, timeout_s=30.0)
    assert caught.value.failures[0] == "OwnError"
    assert caught.value.failures[1] not in ("died", "hung")
    assert float((tmp_path / "seen").read_text()) - float((tmp_path / "fault").read_text()) < REPORTED_S


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from tests.strategies.models import BATCH, loader, loss_of, task, trainer

kind, victim, at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rank = int(os.environ.get("LOCAL_RANK", "0"))
Path(f"pid-{rank}").write_text(str(os.getpid()))

def training_step(self, batch, batch_idx):
    if rank == victim and batch_idx == at:
        Path("fault").write_text(str(time.time()))
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("of the user's code")
    return loss_of(self.net, batch[0])

if __name__ == "__main__":
    trainer("dropcompute", accumulate_grad_batches=4).fit(task(training_step=training_step), loader(rank, 2, 192))
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["raise", "die"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_launched_project_leaves_no_process_behind(tmp_path: Path, kind: str, victim: int) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    arguments = ("-m", "lightning_eff", "run", "train.py", kind, str(victim), str(MIDDLE))
    with no_orphans(tmp_path):
        done = run_python(*arguments, cwd=tmp_path, timeout=60)
        ended = time.time()
    assert done.returncode != 0
    assert ended - float((tmp_path / "fault").read_text()) < ENDED_S, done.stderr[-2000:]
