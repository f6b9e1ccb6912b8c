"""strategy="pipelined_bp" when a rank dies, raises, hangs or computes NaN: every rank ends with an error, soon."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_eff.errors import EffWarning, NonFiniteGradientError, RankLostError
from tests.harness import RanksFailedError, run_ranks
from tests.integration.conftest import run_python
from tests.strategies.faults import ENDED_S, FAULTS, REPORTED_S, TIMEOUT_S, WAITED_FOR
from tests.strategies.pipelined_bp.models import (
    BATCH,
    CUTS,
    FEATURES,
    Outcome,
    data,
    differences,
    fit,
    loader,
    outcome_of,
    strategy,
    task,
    trainer,
)
from tests.strategies.processes import no_orphans

FIRST, MIDDLE, LAST = 0, 7, 9
"""Micro-batches of the first epoch at which a fault happens: the first, one of the middle, the last."""


def _hooks(rank: int, folder: Path, kind: str, victim: int, where: str, at: int) -> dict[str, Any]:
    """Methods of a model in which ``victim`` fails."""

    def reach(here: str, now: bool = True) -> None:
        if now and (rank, here) == (victim, where) and not (folder / "fault").exists():
            (folder / "fault").write_text(str(time.time()))
            FAULTS[kind](folder)

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        reach("batch", batch_idx == at)

    def forward(self: Any, x: Tensor) -> Tensor:
        reach("training_step" if self.trainer.training else "validation")
        return self.run[0](x)  # type: ignore[no-any-return]

    def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
        reach("drain", self.trainer.strategy._draining)

    def on_train_epoch_end(self: Any) -> None:
        reach("epoch end")

    def on_train_start(self: Any) -> None:
        def before(*_: Any) -> None:
            """A layer fails, after its input has come; not when rank 0 looks at it."""
            engine = self.trainer.strategy._engine
            reach("layer", engine is not None and engine.sample == at)

        self.net[2].register_forward_pre_hook(before)

    given = (on_train_start, on_train_batch_start, forward, on_before_optimizer_step, on_train_epoch_end)
    return {hook.__name__: hook for hook in given}


def _fit_with_fault(rank: int, world: int, folder: str, kind: str, victim: int, where: str, at: int) -> None:
    """Train; ``victim`` fails. Each rank writes when that was, or when it heard of it."""
    used = strategy(stages=CUTS[world], timeout_s=TIMEOUT_S if kind in WAITED_FOR else 60.0)
    model = task(hooks=_hooks(rank, Path(folder), kind, victim, where, at))
    try:
        trainer(used, devices=world).fit(model, loader(), loader(10, seed=2, shuffle=False))
    except BaseException:
        if rank != victim:
            (Path(folder) / f"seen-{rank}").write_text(str(time.time()))
        raise


def _fail(folder: Path, kind: str, victim: int, where: str, at: int, world: int) -> tuple[RanksFailedError, float]:
    """What all ranks reported, and seconds from the fault to the error on the last rank without a fault."""
    if kind in WAITED_FOR:
        run_ranks(fit, world, {"stages": CUTS[world]}, init_group=False)  # imports everything
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(_fit_with_fault, world, str(folder), kind, victim, where, at, init_group=False, timeout_s=30.0)
    seen = [float(path.read_text()) for path in folder.glob("seen-*")]
    assert len(seen) == world - 1
    return caught.value, max(seen) - float((folder / "fault").read_text())


def _told(error: RanksFailedError, rank: int) -> str:
    """The message of the RankLostError on ``rank``."""
    lines = [line for line in str(error).splitlines() if "RankLostError: " in line]
    (own,) = (line for line in lines if f"where rank {rank} was" in line)
    return own


Case = tuple[str, int, str, int, int]
"""Kind, victim, where, micro-batch, ranks."""


def _cases_of(some: list[Case], every: list[Case]) -> list[Any]:
    return [*some, *(pytest.param(case, marks=pytest.mark.long) for case in every if case not in some)]


def _everywhere(kind: str) -> list[Case]:
    return [
        *((kind, victim, "batch", at, 2) for victim in (0, 1) for at in (FIRST, MIDDLE, LAST)),
        *((kind, victim, "batch", MIDDLE, 3) for victim in (0, 1, 2)),
        *((kind, victim, where, 0, 2) for victim in (0, 1) for where in ("validation", "epoch end")),
        (kind, 1, "drain", 0, 2),
    ]


def _check(tmp_path: Path, case: Case, ended: str) -> RanksFailedError:
    _, victim, _, _, world = case
    error, after_s = _fail(tmp_path, *case)
    others = set(range(world)) - {victim}
    assert error.failures == {victim: ended, **dict.fromkeys(others, "RankLostError")}
    assert after_s < REPORTED_S
    for rank in others:
        told = _told(error, rank)  # the store may be gone with rank 0
        assert f"rank {victim} (last seen at" in told or (victim == 0 and "Rank 0 has ended" in told)
    assert "The above exception was the direct cause" in str(error)
    return error


SOME: list[Case] = [
    ("raise", 0, "batch", MIDDLE, 2),
    ("raise", 1, "batch", FIRST, 2),
    ("raise", 1, "validation", 0, 2),
    ("raise", 1, "drain", 0, 2),
    ("raise", 1, "batch", MIDDLE, 3),
]


@pytest.mark.parametrize("case", _cases_of(SOME, _everywhere("raise")), ids=str)
def test_a_rank_that_raises_ends_the_others(tmp_path: Path, case: Case) -> None:
    """Though its process lives on: the connections of what neighbours have asked for in advance are closed."""
    _check(tmp_path, case, "OwnError")


HANGS: list[Case] = [("hang", 0, "training_step", FIRST, 2), ("hang", 1, "layer", MIDDLE, 3)]


@pytest.mark.parametrize("case", _cases_of(HANGS, _everywhere("hang")), ids=str)
def test_a_rank_that_hangs_ends_the_others_after_the_timeout(tmp_path: Path, case: Case) -> None:
    _, victim, _, _, world = case
    error, after_s = _fail(tmp_path, *case)
    assert TIMEOUT_S * 0.5 < after_s < TIMEOUT_S + REPORTED_S
    assert "imed out" in str(error)
    for rank in set(range(world)) - {victim}:
        assert error.failures[rank] == "RankLostError"
        assert f"rank {victim} (last seen at" in _told(error, rank)


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_process_is_named_though_it_may_keep_the_store(tmp_path: Path, victim: int) -> None:
    error, after_s = _fail(tmp_path, "freeze", victim, "batch", MIDDLE, 2)
    assert TIMEOUT_S * 0.5 < after_s < TIMEOUT_S + REPORTED_S
    assert error.failures == {victim: "hung", 1 - victim: "RankLostError"}
    expected = "Missing: rank 1 (last seen at micro-batch 6)" if victim else "Rank 0 hangs or cannot be reached"
    assert expected in _told(error, 1 - victim)


def test_an_error_in_the_first_training_step_is_everybodys(tmp_path: Path) -> None:
    """Rank 0 alone runs it, to look at the model; the others say what it was."""
    error, after_s = _fail(tmp_path, "raise", 0, "training_step", FIRST, 3)
    assert error.failures == dict.fromkeys(range(3), "OwnError")
    assert str(error).count("of the user's code") >= 3
    assert after_s < REPORTED_S


OF_STAGE = {2: ["head.weight", "pre.weight"], 3: ["head.weight", "net.3.linear.weight", "pre.weight"]}
"""Ranks -> a parameter on each."""


def _poisoned(rank: int, world: int, victim: int, at: int, value: float, options: dict[str, Any]) -> dict[str, Any]:
    """A NaN loss, or an infinite gradient of one parameter on ``victim``, in micro-batch ``at``."""
    before: dict[str, Tensor] = {}

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        broken = math.isnan(value) and self.trainer.global_step == at
        return F.cross_entropy(self(batch[0]), batch[1]) * (value if broken else 1.0)

    def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
        before.update({name: p.detach().clone() for name, p in self.named_parameters()})

    model = task(hooks={"training_step": training_step, "on_before_optimizer_step": on_before_optimizer_step})

    def infinite(grad: Tensor) -> Tensor:
        engine = run.strategy._engine
        return grad * value if engine is not None and engine.weights.updates == at else grad

    if math.isinf(value):
        dict(model.named_parameters())[OF_STAGE[world][victim]].register_hook(infinite)
    told, kind = "", ""
    run = trainer(strategy(stages=CUTS[world], **options), devices=world)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run.fit(model, loader(), loader(10, seed=2, shuffle=False))
        except (NonFiniteGradientError, RankLostError) as error:
            told, kind = str(error), type(error).__name__
    after = dict(model.named_parameters())
    return {
        "kind": kind,
        "told": told,
        "finite": all(bool(p.isfinite().all()) for p in after.values()),
        "unchanged": all(torch.equal(after[name], p) for name, p in before.items()),
        "warned": [str(w.message) for w in caught if issubclass(w.category, EffWarning)],
    }


@pytest.mark.parametrize(
    ("world", "victim", "at", "value"),
    [
        (2, 0, FIRST, math.nan),
        (2, 0, MIDDLE, math.inf),
        (2, 1, FIRST, math.inf),
        (2, 1, LAST, math.inf),  # arrives when the pipeline is drained
        (2, 0, 19, math.nan),  # the last of all
        (3, 0, MIDDLE, math.nan),
        (3, 1, MIDDLE, math.inf),
    ],
)
def test_a_broken_gradient_reaches_no_parameter_on_any_rank(world: int, victim: int, at: int, value: float) -> None:
    results = run_ranks(_poisoned, world, victim, at, value, {}, init_group=False)
    assert all(result["finite"] for result in results)
    broken = results[victim]
    assert broken["kind"] == "NonFiniteGradientError"
    assert broken["unchanged"]
    assert f"the gradient of micro-batch {at} is NaN or Inf on rank {victim} in" in broken["told"]
    assert OF_STAGE[world][victim] in broken["told"]
    for rank in set(range(world)) - {victim}:
        # The gradient of a NaN loss may have reached the stages before; or they hear that the rank has ended.
        assert (
            results[rank]["kind"] == "RankLostError"
            or f"micro-batch {at} is NaN or Inf on rank {rank}" in results[rank]["told"]
        )


def test_a_user_may_go_on_with_it() -> None:
    """With a warning for every broken update, on the rank whose it is."""
    last, first = run_ranks(_poisoned, 2, 0, 15, math.nan, {"on_nonfinite": "warn"}, init_group=False)
    for rank, result in enumerate((last, first)):
        assert not result["told"]
        assert not result["finite"]
        said = [line for line in result["warned"] if "is NaN or Inf" in line]
        assert [f"micro-batch {i} is NaN or Inf on rank {rank} in" in line for i, line in enumerate(said, 15)] == [
            True
        ] * 5


SLOW_S = 0.03
"""Some ten times what a micro-batch takes."""


class Lengths(torch.utils.data.Dataset[Any]):
    """Sequences; every micro-batch has another length, and none is as short as the first."""

    lengths = (2, 7, 40, 3, 11, 2, 100, 5)

    def __len__(self) -> int:
        return BATCH * len(self.lengths)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        length = self.lengths[i // BATCH]
        x, y = data(length * BATCH, seed=i)
        return x[:length].view(length, FEATURES), y[0]


def _unusual(rank: int, world: int, what: str, victim: int, mitigation: str = "lwp+sc") -> Outcome:
    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        if what == "slow" and rank == victim:
            time.sleep(SLOW_S)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        out = self(batch[0])
        loss = F.cross_entropy(out.mean(1) if what == "lengths" else out, batch[1])
        self.log("loss", loss)
        return None if what == "none" and batch_idx % 4 in (0, 3) and self.trainer.global_step else loss

    model = task(hooks={"on_train_batch_start": on_train_batch_start, "training_step": training_step})
    if what == "in place":
        model.net.insert(3, torch.nn.ReLU(inplace=True))  # the second stage's first layer: its input is a leaf there
    used = strategy(stages=CUTS[2], mitigation=mitigation)
    run = trainer(used, devices=world, limit_val_batches=0 if what == "lengths" else 1.0)
    rows = torch.utils.data.DataLoader(Lengths(), BATCH) if what == "lengths" else loader()
    began = time.monotonic()
    if what == "lengths":
        model.validated.append(0.0)
        run.fit(model, rows)
        run.callback_metrics["val_loss"] = torch.zeros(())
    else:
        run.fit(model, rows, loader(10, seed=2, shuffle=False))
    result = outcome_of(model, run)
    result.extra = time.monotonic() - began
    return result


@pytest.mark.parametrize(("what", "victim"), [("slow", 0), ("slow", 1), ("none", 0), ("lengths", 0), ("in place", 0)])
def test_what_is_unusual_changes_nothing_in_the_result(what: str, victim: int) -> None:
    """A slow rank, micro-batches without a loss, such of other lengths, layers in place: the bits of one process."""
    mitigation = "lwp+sc+stash" if what == "none" else "lwp+sc"
    run_ranks(fit, 2, {"stages": CUTS[2]}, init_group=False)  # imports everything: some of that draws from `random`
    real = run_ranks(_unusual, 2, what, victim, mitigation, init_group=False)
    (emulated,) = run_ranks(_unusual, 1, "" if what == "slow" else what, victim, mitigation, init_group=False)
    assert differences(real, emulated) == []
    if what == "slow":
        steps = emulated.trainer["global_step"]
        assert steps * SLOW_S < real[0].extra < emulated.extra + 2 * steps * SLOW_S + 1.0, "it waits, and no more"


DEATHS: list[Case] = [("die", 1, "batch", LAST, 2), ("exit", 0, "training_step", FIRST, 2)]


MORE = [*_everywhere("die"), *(("exit", victim, "training_step", MIDDLE, 2) for victim in (0, 1))]


@pytest.mark.parametrize("case", _cases_of(DEATHS, MORE), ids=str)
def test_a_rank_that_dies_ends_the_others(tmp_path: Path, case: Case) -> None:
    error = _check(tmp_path, case, "died")
    assert f"exit code {-9 if case[0] == 'die' else 3}" in str(error)


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from tests.strategies.pipelined_bp.models import CUTS, loader, strategy, task, trainer

kind, victim, at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rank = int(os.environ.get("LOCAL_RANK", "0"))
Path(f"pid-{rank}").write_text(str(os.getpid()))

def on_train_batch_start(self, batch, batch_idx):
    if rank == victim and batch_idx == at:
        Path("fault").write_text(str(time.time()))
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            os._exit(3)
        if kind == "nan":
            self.pre.weight.register_hook(lambda g: g * float("nan"))
            self.head.weight.register_hook(lambda g: g * float("nan"))
            return
        raise RuntimeError("of the user's code")

if __name__ == "__main__":
    model = task(hooks={"on_train_batch_start": on_train_batch_start})
    trainer(strategy(stages=CUTS[2], timeout_s=600.0), devices=2).fit(model, loader(), loader(10))
"""


@pytest.mark.parametrize(
    ("kind", "victim"),
    [pytest.param(k, v, marks=pytest.mark.long) for k in ("raise", "die", "exit", "nan") for v in (0, 1)],
)
def test_a_script_ends_with_an_error_and_leaves_no_process_behind(tmp_path: Path, kind: str, victim: int) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    with no_orphans(tmp_path):
        done = run_python("train.py", kind, str(victim), str(MIDDLE), cwd=tmp_path, timeout=60)
        ended = time.time()
    assert done.returncode != 0
    assert ended - float((tmp_path / "fault").read_text()) < ENDED_S, done.stderr[-2000:]
