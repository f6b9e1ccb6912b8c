"""strategy="dropcompute" across checkpoints: the same bits, the threshold kept, plain Lightning on either side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.loaders import ResumableLoader
from tests.strategies.dropcompute.plans import PLAN, SAMPLES, STEPS, M, planned
from tests.strategies.models import BATCH, NAMESPACES, loader, parameters_of, stock, task, trainer

KEY = "DropComputeStrategy"


TWO_EPOCHS = [row * 2 for row in PLAN]


COMPUTED = [sum(row[step] for row in TWO_EPOCHS) for step in range(2 * STEPS)]


def _saver(folder: str, cut: int | None, after: int = 0) -> Any:
    """Save ``cut.ckpt`` after step ``cut``, or ``after`` micro-batches later, and stop there."""
    from lightning.pytorch.callbacks import Callback

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            batch_idx: int = args[-1]
            if trainer.global_step == cut and (batch_idx + 1) % M == after:
                trainer.save_checkpoint(Path(folder) / "cut.ckpt")
                trainer.should_stop = True

    return Save()


def _run(
    rank: int,
    world: int,
    folder: str,
    strategy: Any,
    *,
    cut: int | None = None,
    after: int = 0,
    resume: bool | str = False,
    root: str = NAMESPACES[0],
    samples: int = SAMPLES,
    plain: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Two epochs, or up to ``cut``; what every step left behind."""
    steps: list[Tensor] = []
    lrs: list[float] = []

    def on_train_batch_end(self: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        losses.append(float(outputs["loss"]))
        if (batch_idx + 1) % M == 0:
            steps.append(parameters_of(self.net))
            lrs.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    losses: list[float] = []
    model = task(root, on_train_batch_end=on_train_batch_end)
    if plain:
        model.unused = nn.Identity()  # stock DistributedDataParallel refuses it
    callbacks = [*options.pop("callbacks", []), *([_saver(folder, cut, after)] if cut else [])]
    options = {"accumulate_grad_batches": M, "max_epochs": 2, "callbacks": callbacks, **options}
    runner = trainer(strategy, root, **options)
    name = resume if isinstance(resume, str) else "cut.ckpt"
    torch.manual_seed(4 if resume else 3)
    runner.fit(
        model, ResumableLoader(loader(rank, world, samples)), ckpt_path=str(Path(folder) / name) if resume else None
    )
    momentum = [state["momentum_buffer"] for state in runner.optimizers[0].state.values() if "momentum_buffer" in state]
    return {
        "steps": steps,
        "losses": losses,
        "lrs": lrs,
        "momentum": torch.cat([m.reshape(-1) for m in momentum]),
        "global_step": runner.global_step,
        "threshold_s": getattr(strategy, "threshold_s", None),
        "strategy_steps": getattr(strategy, "_steps", None),
        "measuring_until": strategy._search.measuring_until if hasattr(strategy, "_search") else None,
        "max_steps": runner.max_steps,
        "runner": runner,
    }


def _told(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "runner"}


def _cut_and_continue(rank: int, world: int, folder: str, cut: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    whole = _run(rank, world, folder, planned(TWO_EPOCHS), **options)
    _run(rank, world, folder, planned(TWO_EPOCHS), cut=cut, **options)
    return [_told(whole), _told(_run(rank, world, folder, planned(TWO_EPOCHS), resume=True, **options))]


def _same(whole: dict[str, Any], continued: dict[str, Any], cut: int) -> None:
    assert continued["losses"] == whole["losses"][cut * M :]
    assert len(continued["losses"]) == (2 * STEPS - cut) * M
    assert continued["lrs"] == whole["lrs"][cut:]
    for first, second in zip(continued["steps"], whole["steps"][cut:], strict=True):
        assert torch.equal(first, second)
    assert torch.equal(continued["momentum"], whole["momentum"])
    assert continued["global_step"] == continued["strategy_steps"] == whole["global_step"] == 2 * STEPS


@pytest.mark.parametrize("cut", [1, 4, pytest.param(STEPS, id="epoch"), 2 * STEPS - 1])
def test_a_run_cut_after_any_step_continues_to_the_same_bits(tmp_path: Path, cut: int) -> None:
    results = run_ranks(_cut_and_continue, 2, str(tmp_path), cut, {}, init_group=False)
    for whole, continued in results:
        _same(whole, continued, cut)
    assert torch.equal(results[0][1]["steps"][-1], results[1][1]["steps"][-1])
    state = torch.load(tmp_path / "cut.ckpt", weights_only=True)[KEY]
    assert set(state) == {"threshold_s", "measured", "steps", "computed", "dropped"}
    assert (state["steps"], state["computed"]) == (cut, sum(COMPUTED[:cut]))
    assert state["dropped"] == 2 * M * cut - state["computed"]


@pytest.mark.parametrize("key", ["steps"])
def test_the_state_is_needed(tmp_path: Path, key: str) -> None:
    """Negative control: without it the plan is replayed from the wrong place."""
    results = run_ranks(_cut_and_lose, 2, str(tmp_path), key, init_group=False)
    for whole, continued in results:
        assert not torch.equal(continued["steps"][-1], whole["steps"][-1])


def _cut_and_lose(rank: int, world: int, folder: str, key: str) -> list[dict[str, Any]]:
    import torch.distributed as dist

    whole = _run(rank, world, folder, planned(TWO_EPOCHS))
    _run(rank, world, folder, planned(TWO_EPOCHS), cut=4)
    if rank == 0:
        checkpoint = torch.load(Path(folder) / "cut.ckpt", weights_only=True)
        checkpoint[KEY][key] = 0
        torch.save(checkpoint, Path(folder) / "cut.ckpt")
    dist.barrier()
    return [_told(whole), _told(_run(rank, world, folder, planned(TWO_EPOCHS), resume=True))]


def _through_model_checkpoint(rank: int, world: int, folder: str) -> list[dict[str, Any]]:
    from lightning.pytorch.callbacks import ModelCheckpoint

    every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole = _run(rank, world, folder, planned(TWO_EPOCHS), callbacks=[every], enable_checkpointing=True)
    resumed = planned(TWO_EPOCHS)
    return [_told(whole), _told(_run(rank, world, folder, resumed, resume="step=8.ckpt"))]


def test_checkpoints_of_a_callback_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    for whole, continued in run_ranks(_through_model_checkpoint, 2, str(tmp_path), init_group=False):
        _same(whole, continued, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=12.ckpt", "step=4.ckpt", "step=8.ckpt"]


def _inside_a_window(rank: int, world: int, folder: str) -> list[dict[str, Any]]:
    results = []
    for kind in ("planned", "ddp"):
        strategy = [planned([[M] * 2 * STEPS] * 2) if kind == "planned" else stock() for _ in range(2)]
        where = str(Path(folder) / kind)
        more: dict[str, Any] = {"plain": True}
        _run(rank, world, where, strategy[0], cut=4, after=2, **more)
        results.append(_told(_run(rank, world, where, strategy[1], resume=True, **more)))
    return results


def test_a_checkpoint_inside_a_window_resumes_as_stock_lightning_does(tmp_path: Path) -> None:
    """It holds no gradients, so the micro-batches before it are lost to that step, there as here."""
    for ours, theirs in run_ranks(_inside_a_window, 2, str(tmp_path), init_group=False):
        assert ours["global_step"] == ours["strategy_steps"] == theirs["global_step"] == 2 * STEPS
        assert ours["losses"] == theirs["losses"]
        for first, second in zip(ours["steps"], theirs["steps"], strict=True):
            assert torch.equal(first, second)


def _added_and_taken(rank: int, world: int, folder: str) -> dict[str, Any]:
    full = [[M] * 2 * STEPS] * 2
    whole = _run(rank, world, folder, stock(), plain=True)
    _run(rank, world, folder, planned(full), cut=4, plain=True)
    taken = _run(rank, world, folder, stock(), resume=True, plain=True)
    other = str(Path(folder) / "other")
    _run(rank, world, other, stock(), cut=4, plain=True)
    added = _run(rank, world, other, planned([row[4:] for row in full]), resume=True, plain=True)
    return {"whole": _told(whole), "taken": _told(taken), "added": _told(added)}


def test_the_strategy_is_taken_from_and_added_to_a_run(tmp_path: Path) -> None:
    for result in run_ranks(_added_and_taken, 2, str(tmp_path), init_group=False):
        for key in ("taken", "added"):
            assert result[key]["global_step"] == 2 * STEPS
            assert torch.equal(result[key]["steps"][-1], result["whole"]["steps"][-1])
            assert torch.equal(result[key]["momentum"], result["whole"]["momentum"])
        assert result["added"]["strategy_steps"] == 2 * STEPS - 4


def _cut_only(rank: int, world: int, folder: str) -> None:
    _run(rank, world, folder, planned(TWO_EPOCHS), cut=4)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("root", NAMESPACES)
def test_one_device_without_the_strategy_goes_on(tmp_path: Path, root: str) -> None:
    run_ranks(_cut_only, 2, str(tmp_path), init_group=False)
    result = _run(0, 2, str(tmp_path), "auto", devices=1, resume=True, root=root)
    assert result["global_step"] == 2 * STEPS


MEASURED_STEPS = 22


MEASURED_SAMPLES = 2 * BATCH * M * MEASURED_STEPS


def _timed(**options: Any) -> Any:
    from lightning_eff.strategies import DropComputeStrategy

    given = {"threshold": "auto", "warmup_steps": 8, "max_drop_rate": 0.5, "delay": "slow:rank=1,factor=15"}
    return DropComputeStrategy(**{**given, **options}, process_group_backend="gloo")


def _through_warm_up(
    rank: int, world: int, folder: str, cuts: list[int], given: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The run, cut and resumed at every one of ``cuts``, each part with its options of the strategy."""
    results = []
    parts = given or [{}] * (len(cuts) + 1)
    for number, (cut, options) in enumerate(zip([*cuts, None], parts, strict=True)):
        more: dict[str, Any] = {"samples": MEASURED_SAMPLES, "max_epochs": 1, "cut": cut, "resume": number > 0}
        results.append(_told(_run(rank, world, folder, _timed(**options), **more)))
    return results


@pytest.mark.alone
@pytest.mark.parametrize("cuts", [pytest.param([4], marks=pytest.mark.long), [7, 13]], ids=str)
def test_a_warm_up_that_was_cut_begins_again(tmp_path: Path, cuts: list[int]) -> None:
    """As often as it is cut: seven steps, then six of the eight that were to be measured anew."""
    first, second = run_ranks(_through_warm_up, 2, str(tmp_path), cuts, init_group=False)
    assert all(math.isinf(result["threshold_s"]) for result in first[:-1])
    assert first[-1]["measuring_until"] == cuts[-1] + 8
    assert first[-1]["threshold_s"] == second[-1]["threshold_s"] < math.inf
    assert first[-1]["global_step"] == MEASURED_STEPS


def _kept_or_replaced(rank: int, world: int, folder: str) -> list[dict[str, Any]]:
    results = _through_warm_up(rank, world, folder, [10])
    given = _timed(threshold=7.5, delay=None)
    more: dict[str, Any] = {"samples": MEASURED_SAMPLES, "max_epochs": 1}
    return [*results, _told(_run(rank, world, folder, given, resume=True, **more))]


@pytest.mark.alone
def test_a_measured_threshold_is_kept_and_one_in_seconds_is_the_callers(tmp_path: Path) -> None:
    results = run_ranks(_kept_or_replaced, 2, str(tmp_path), init_group=False)
    state = torch.load(tmp_path / "cut.ckpt", weights_only=True)[KEY]
    saved = state["threshold_s"]
    assert state["measured"] is True
    assert 0 < saved < math.inf
    for cut, continued, given in results:
        assert cut["threshold_s"] == continued["threshold_s"] == saved
        assert continued["measuring_until"] == 0
        assert given["threshold_s"] == 7.5


NOTHING_TO_DROP = {"min_micro_batches": M}
"""Every micro-batch is computed, so that no threshold gains anything: inf is measured."""


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "cut.ckpt", weights_only=True)[KEY]
    return state


@pytest.mark.alone
def test_a_measured_inf_is_kept_as_well(tmp_path: Path) -> None:
    given = [NOTHING_TO_DROP, {}]
    for cut, continued in run_ranks(_through_warm_up, 2, str(tmp_path), [10], given, init_group=False):
        assert math.isinf(cut["threshold_s"])
        assert math.isinf(continued["threshold_s"]), "measured again, the slow rank would have given a finite one"
        assert continued["measuring_until"] == 0
    state = _state(tmp_path)
    assert (state["threshold_s"], state["measured"]) == (math.inf, True)


def test_a_threshold_that_was_given_is_not_taken_for_a_measured_one(tmp_path: Path) -> None:
    given = [{"threshold": 7.5, "delay": None}, {}]
    results = run_ranks(_through_warm_up, 2, str(tmp_path), [10], given, init_group=False)
    for cut, continued in results:
        assert cut["threshold_s"] == 7.5
        assert continued["measuring_until"] == 10 + 8
        assert 0 < continued["threshold_s"] == results[0][1]["threshold_s"] < 7.5
    state = _state(tmp_path)
    assert (state["threshold_s"], state["measured"]) == (7.5, False)


def _from_an_older_version(rank: int, world: int, folder: str, threshold_s: float) -> dict[str, Any]:
    import torch.distributed as dist

    more: dict[str, Any] = {"samples": MEASURED_SAMPLES, "max_epochs": 1}
    _run(rank, world, folder, _timed(**NOTHING_TO_DROP), cut=10, **more)
    if rank == 0:
        checkpoint = torch.load(Path(folder) / "cut.ckpt", weights_only=True)
        del checkpoint[KEY]["measured"]
        checkpoint[KEY]["threshold_s"] = threshold_s
        torch.save(checkpoint, Path(folder) / "cut.ckpt")
    dist.barrier()
    return _told(_run(rank, world, folder, _timed(), resume=True, **more))


@pytest.mark.long
@pytest.mark.parametrize("saved", [5.0, math.inf])
def test_a_checkpoint_that_does_not_say_whether_it_measured(tmp_path: Path, saved: float) -> None:
    """A finite threshold is kept, inf is measured."""
    for result in run_ranks(_from_an_older_version, 2, str(tmp_path), saved, init_group=False):
        assert result["measuring_until"] == (0 if saved == 5.0 else 10 + 8)
        assert (result["threshold_s"] == 5.0) == (saved == 5.0)
        assert result["threshold_s"] < math.inf


def _cut_after_a_change(rank: int, world: int, folder: str) -> list[dict[str, Any]]:
    """Measured with 2 micro-batches in a step; cut while it measures again, with 4."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    options: dict[str, Any] = {"samples": 2 * BATCH * M * 5, "max_epochs": 4}
    change = GradientAccumulationScheduler({0: 2, 1: M})
    first = _run(rank, world, folder, _timed(), cut=13, callbacks=[change], accumulate_grad_batches=1, **options)
    return [_told(first), _told(_run(rank, world, folder, _timed(), resume=True, **options))]


@pytest.mark.alone
def test_a_threshold_for_other_steps_is_not_kept(tmp_path: Path) -> None:
    first, second = run_ranks(_cut_after_a_change, 2, str(tmp_path), init_group=False)
    state = _state(tmp_path)
    assert state["measured"] is False
    assert state["steps"] == 13
    assert state["threshold_s"] == first[0]["threshold_s"] < math.inf
    assert first[1]["measuring_until"] == second[1]["measuring_until"] == 13 + 8
    assert first[1]["threshold_s"] == second[1]["threshold_s"] < math.inf
    assert first[1]["threshold_s"] != first[0]["threshold_s"]


def _saved_afterwards(rank: int, world: int, folder: str) -> None:
    result = _run(rank, world, folder, planned(TWO_EPOCHS))
    result["runner"].save_checkpoint(Path(folder) / "after.ckpt")


def test_a_checkpoint_saved_after_training_holds_the_tally(tmp_path: Path) -> None:
    run_ranks(_saved_afterwards, 2, str(tmp_path), init_group=False)
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)[KEY]
    assert (state["steps"], state["computed"]) == (2 * STEPS, sum(COMPUTED))
    assert state["dropped"] == 2 * M * 2 * STEPS - sum(COMPUTED)


def _extra_steps(rank: int, world: int, folder: str, cut: int) -> list[dict[str, Any]]:
    plan = [[2] * 40, [4] * 40]  # a quarter is dropped: every fourth step adds one
    more: dict[str, Any] = {"max_steps": 12, "max_epochs": -1}

    def strategy() -> Any:
        return planned(plan, compensate="extra_steps")

    whole = _run(rank, world, folder, strategy(), **more)
    _run(rank, world, folder, strategy(), cut=cut, **more)
    return [_told(whole), _told(_run(rank, world, folder, strategy(), resume=True, **more))]


@pytest.mark.parametrize("cut", [6, 12, 14], ids=["before", "at", "beyond"])
def test_extra_steps_are_still_made_after_a_cut(tmp_path: Path, cut: int) -> None:
    """Also where the checkpoint is of the step that max_steps names, or of a later one."""
    for whole, continued in run_ranks(_extra_steps, 2, str(tmp_path), cut, init_group=False):
        assert whole["global_step"] == continued["global_step"] > 14
        assert continued["max_steps"] == whole["max_steps"]
        assert torch.equal(continued["steps"][-1], whole["steps"][-1])
