"""strategy="pipelined_bp" across checkpoints: the same bits on more ranks or fewer, plain Lightning on either side."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_eff.methods import METHODS
from tests.harness import run_ranks
from tests.harness.ranks import RanksFailedError
from tests.loaders import ResumableLoader
from tests.strategies.pipelined_bp.models import (
    BATCH,
    CUTS,
    NAMESPACES,
    SAMPLES,
    STEPS,
    Outcome,
    bits,
    data,
    loader,
    outcome_of,
    replaced,
    strategy,
    task,
    trainer,
)

KEY = "PipelinedBPStrategy"


EPOCH = STEPS // 2


EVERY = (1, 4, EPOCH, STEPS - 1)
"""Where runs are cut: after the first step, in an epoch, at its end, before the last step."""


def saver(folder: str, cuts: Sequence[int], root: str) -> Any:
    """Save ``<step>.ckpt`` after each of ``cuts``, on all ranks, as a user's callback would."""
    callback = importlib.import_module(f"{root}.callbacks").Callback

    class Save(callback):  # type: ignore[misc,valid-type]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step in cuts:
                trainer.save_checkpoint(Path(folder) / f"{trainer.global_step}.ckpt")

    return Save()


def run(
    folder: str,
    world: int,
    plan: dict[str, Any] | None,
    model: dict[str, Any] | None = None,
    *,
    saves: Sequence[int] = (),
    resume: int | str | None = None,
    root: str = NAMESPACES[0],
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> Outcome:
    """Two epochs of ``plan`` (None: plain Lightning), or what is left of them after ``<resume>.ckpt``."""
    # What a new process would have is not what the checkpointed one had: streams must come from the checkpoint.
    torch.manual_seed(3 if resume is None else 4)
    built = task(root, **(model or {}))
    torch.manual_seed(3 if resume is None else 4)
    used = "auto" if plan is None else strategy(root, **plan)
    runner = trainer(used, root, devices=world, callbacks=[saver(folder, saves, root), *callbacks], **options)
    where = None if resume is None else str(Path(folder) / f"{resume}.ckpt")
    x, y = data(SAMPLES)
    micro_batches = ResumableLoader(zip(x.split(BATCH), y.split(BATCH), strict=True), shuffled=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(built, micro_batches, loader(10, seed=2, shuffle=False), ckpt_path=where)
    result = outcome_of(built, runner)
    engine = getattr(used, "_engine", None)
    result.extra = {
        "warned": [str(w.message) for w in caught if "pipelined_bp" in str(w.message)],
        "starts": engine and engine.partition.starts,
        "samples": engine and engine.weights.samples,
    }
    return result


def same(continued: Outcome, whole: Outcome, cut: int, rank: int = 0) -> None:
    """The rest of a run, to the bit: weights, buffers, the optimizer's state, learning rates, losses."""
    assert continued.trainer["global_step"] == whole.trainer["global_step"] == STEPS
    assert bits(continued.state) == bits(whole.state)
    assert bits(continued.moments) == bits(whole.moments)
    assert len(whole.rates) == STEPS
    assert continued.rates == whole.rates[cut:]
    assert continued.trainer["lr"] == whole.trainer["lr"]
    if rank == 0:  # the last stage's are the loss
        assert len(whole.losses) == STEPS
        assert bits(continued.losses) == bits(whole.losses[cut:])


DROPOUT = {"dropout": 0.3}


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lwp+sc": ({}, DROPOUT),
    "lwp_w+sc": ({"mitigation": "lwp_w+sc"}, {"norm": "batch"}),
    "adamw": ({"mitigation": "lwp"}, {"optimizer": "adamw", **DROPOUT}),
    "stash": ({"mitigation": "none", "stash": True}, {"kind": "list", **DROPOUT}),
    "spectrain": ({"mitigation": "spectrain"}, {"schedule": "epoch"}),
    "in_flight=1": ({"in_flight": 1}, DROPOUT),
}


CELLS = [(name, world) for name in RUNS for world in (1, 2, 3) if world == 2 or name in ("lwp+sc", "lwp_w+sc", "stash")]


LONGER = [
    *(("lwp_w+sc", 1), ("stash", 1), ("spectrain", 2), ("in_flight=1", 2), ("lwp_w+sc", 3)),
    *(("lwp+sc", 2), ("lwp_w+sc", 2), ("stash", 3)),
]


def _cut_everywhere(rank: int, world: int, folder: str, name: str) -> list[Outcome]:
    plan, model = RUNS[name]
    plan = {"stages": CUTS[max(world, 2)], **plan}
    whole = run(folder, world, plan, model)
    saved = run(folder, world, plan, model, saves=EVERY)
    return [whole, saved, *(run(folder, world, plan, model, resume=cut) for cut in EVERY)]


@pytest.mark.parametrize(
    ("name", "world"),
    [pytest.param(*cell, marks=[pytest.mark.long] if cell in LONGER else []) for cell in CELLS],
)
def test_a_run_cut_after_any_step_continues_to_the_same_bits(tmp_path: Path, name: str, world: int) -> None:
    results = run_ranks(_cut_everywhere, world, str(tmp_path), name, init_group=False)
    for rank, (whole, saved, *continued) in enumerate(results):
        same(saved, whole, 0, rank)  # to save is to make the updates that are under way, and no more
        for cut, result in zip(EVERY, continued, strict=True):
            same(result, whole, cut, rank)
            assert result.extra["samples"] == STEPS
            assert result.extra["warned"] == []
            assert bits(result.state) == bits(results[0][0].state)


def test_the_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    """It loads without pickle, and has every weight and every state of the optimizer under its usual name."""
    run_ranks(_save, 2, str(tmp_path), "lwp+sc", init_group=False)
    ours = torch.load(tmp_path / "4.ckpt", weights_only=True)
    run_ranks(_save, 1, str(tmp_path), None, init_group=False)
    plain = torch.load(tmp_path / "4.ckpt", weights_only=True)
    assert list(ours["state_dict"]) == list(plain["state_dict"])
    assert set(ours) - set(plain) == {KEY}
    assert set(ours[KEY]) == set(METHODS["pipelined_bp"].state_keys)
    (mine,), (theirs,) = ours["optimizer_states"], plain["optimizer_states"]
    assert set(mine["state"]) == set(theirs["state"])
    assert mine["param_groups"] == theirs["param_groups"]
    for i, state in theirs["state"].items():
        assert {k: v.shape for k, v in mine["state"][i].items()} == {k: v.shape for k, v in state.items()}
    assert ours[KEY]["samples"] == ours["global_step"] == 4
    versions = {stage["stage"]: sorted(stage["versions"]) for stage in ours[KEY]["stages"]}
    assert versions == {0: ["2", "3"], 1: []}, "D of each stage: what the samples in flight next are to see"


def _save(rank: int, world: int, folder: str, name: str | None, stages: int = 2) -> Outcome:
    plan, model = RUNS[name] if name else (None, {})
    return run(folder, world, None if plan is None else {"stages": CUTS[stages], **plan}, model, saves=[4])


def _through_model_checkpoint(rank: int, world: int, folder: str) -> list[Outcome]:
    from lightning.pytorch.callbacks import ModelCheckpoint

    plan, model = {"stages": CUTS[2]}, {"norm": "batch", **DROPOUT}
    whole = run(folder, world, plan, model)
    kept = [
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1),
        ModelCheckpoint(folder, filename="val-{step}", monitor="val_loss", save_top_k=-1, save_last=True),
    ]
    run(folder, world, plan, model, callbacks=kept, enable_checkpointing=True)
    return [whole, *(run(folder, world, plan, model, resume=name) for name in ("step=8", "val-step=15", "val-step=10"))]


def test_through_the_checkpoints_of_model_checkpoint(tmp_path: Path) -> None:
    """Of a training step, of a validation in an epoch, and of the one at its end."""
    results = run_ranks(_through_model_checkpoint, 2, str(tmp_path), init_group=False)
    for rank, (whole, *continued) in enumerate(results):
        for cut, result in zip((8, 15, 10), continued, strict=True):
            same(result, whole, cut, rank)
    assert (tmp_path / "last.ckpt").exists()


def _resumed(rank: int, world: int, folder: str, name: str, stages: int, resume: int = 4) -> Outcome:
    plan, model = RUNS[name]
    return run(folder, world, {"stages": CUTS[stages], **plan}, model, resume=resume)


@pytest.mark.parametrize(
    "name", ["lwp_w+sc", *(pytest.param(name, marks=pytest.mark.long) for name in ("adamw", "stash"))]
)
@pytest.mark.parametrize(("saved", "resumed"), [(2, 1), (1, 2), pytest.param(3, 1, marks=pytest.mark.long), (3, 2)])
def test_as_many_stages_on_another_number_of_ranks(tmp_path: Path, saved: int, resumed: int, name: str) -> None:
    stages = max(saved, resumed)
    whole = run_ranks(_save, saved, str(tmp_path), name, stages, init_group=False)[0]
    for rank, result in enumerate(run_ranks(_resumed, resumed, str(tmp_path), name, stages, init_group=False)):
        assert bits(result.state) == bits(whole.state)
        assert result.rates == whole.rates[4:]
        if rank == 0:
            assert bits(result.losses) == bits(whole.losses[4:])
        for parameter in set(result.moments) & set(whole.moments):
            assert bits(result.moments[parameter]) == bits(whole.moments[parameter])


def test_another_number_of_stages_begins_its_delays_anew(tmp_path: Path) -> None:
    run_ranks(_save, 3, str(tmp_path), "lwp+sc", 3, init_group=False)
    on_two = run_ranks(_resumed, 2, str(tmp_path), "lwp+sc", 2, init_group=False)
    on_one = run_ranks(_resumed, 1, str(tmp_path), "lwp+sc", 2, init_group=False)[0]
    for result in on_two:
        assert any("delays begin anew" in message for message in result.extra["warned"])
        assert result.extra["samples"] == STEPS - 4
        assert bits(result.state) == bits(on_one.state)
    assert bits(on_two[0].losses) == bits(on_one.losses)


def _plain_between(rank: int, world: int, folder: str, root: str) -> list[Outcome]:
    """Plain Lightning goes on at step 4, and one process of ours at its step 10."""
    model = {"optimizer": "adamw"}
    return [
        run(folder, world, None, model, resume=4, saves=[EPOCH], root=root),
        run(folder, world, {"stages": CUTS[2], "mitigation": "lwp"}, model, resume=EPOCH, root=root),
    ]


def _ours_after_plain(rank: int, world: int, folder: str) -> Outcome:
    return run(folder, world, {"stages": CUTS[2], "mitigation": "lwp"}, {"optimizer": "adamw"}, resume=EPOCH)


@pytest.mark.parametrize("root", NAMESPACES)
def test_plain_lightning_goes_on_and_back_again(tmp_path: Path, root: str) -> None:
    """Nothing is missing for it; from its checkpoint delays begin anew, on two ranks as on one."""
    run_ranks(_save, 2, str(tmp_path), "adamw", init_group=False)
    ((plain, emulated),) = run_ranks(_plain_between, 1, str(tmp_path), root, init_group=False)
    assert plain.trainer["global_step"] == emulated.trainer["global_step"] == STEPS
    assert len(plain.losses) == STEPS - 4
    assert all(int(state["step"]) == STEPS for state in plain.moments.values())
    assert emulated.extra["samples"] == STEPS - EPOCH
    for rank, result in enumerate(run_ranks(_ours_after_plain, 2, str(tmp_path), init_group=False)):
        assert bits(result.state) == bits(emulated.state)
        assert result.rates == emulated.rates
        assert bits(result.losses) == bits(emulated.losses) or rank == 1


def _lose(key: str, checkpoint: dict[str, Any]) -> None:
    state = checkpoint[KEY]
    if key in ("samples", "seed"):
        state[key] = 0
    for stage in state["stages"]:
        if key == "versions":
            stage["versions"] = {}
        elif key == "previous":
            stage["previous"] = None


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("key", ["samples", "seed", "previous", "all"])
def test_the_state_is_needed(tmp_path: Path, key: str, world: int) -> None:
    """Negative control: without any part of it the run goes on to other weights."""
    name = "lwp_w+sc dropout"
    whole = run_ranks(_save, world, str(tmp_path), name, init_group=False)[0]
    path = tmp_path / "4.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    if key == "all":
        del checkpoint[KEY]
    else:
        _lose(key, checkpoint)
    torch.save(checkpoint, path)
    results = run_ranks(_resumed, world, str(tmp_path), name, 2, init_group=False)
    result = results[0]
    assert result.trainer["global_step"] == STEPS
    assert bits(result.state) != bits(whole.state)
    warned = [message for each in results for message in each.extra["warned"] if "not exact" in message]
    assert bool(warned) == (key == "previous")


def test_lost_versions_are_refused(tmp_path: Path) -> None:
    """Without them the run would go on to other weights, in silence."""
    run_ranks(_save, 1, str(tmp_path), "lwp+sc", init_group=False)
    checkpoint = torch.load(tmp_path / "4.ckpt", weights_only=True)
    _lose("versions", checkpoint)
    torch.save(checkpoint, tmp_path / "4.ckpt")
    with pytest.raises(RanksFailedError, match=r"CheckpointError: .*stage 0 lacks the versions \[2, 3\]"):
        run_ranks(_resumed, 1, str(tmp_path), "lwp+sc", 2, init_group=False)


RUNS["lwp_w+sc dropout"] = ({"mitigation": "lwp_w+sc"}, DROPOUT)


def _lopsided(*args: Any) -> Any:
    """A profile that finds the last layer a hundred times slower than the others."""
    from lightning_eff.strategies.pipelined_bp.profiling import profile_stack

    found = profile_stack(*args)
    found.costs_s = [1.0] * (len(found.costs_s) - 1) + [100.0]
    return found


def _balanced(rank: int, world: int, folder: str) -> list[Outcome]:
    from lightning_eff.strategies.pipelined_bp import assembly

    plan = {"stages": "auto"}
    whole = run(folder, world, plan, DROPOUT, saves=[4])
    with replaced(assembly, "profile_stack", _lopsided):
        return [whole, run(folder, world, plan, DROPOUT, resume=4), run(folder, world, plan, DROPOUT)]


def test_balanced_stages_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """Times measured anew would cut elsewhere, and delays would be others."""
    for rank, (whole, continued, other) in enumerate(run_ranks(_balanced, 2, str(tmp_path), init_group=False)):
        assert other.extra["starts"] == (0, 5)
        assert continued.extra["starts"] == whole.extra["starts"] != other.extra["starts"]
        assert continued.extra["warned"] == []
        same(continued, whole, 4, rank)


def _in_precision(rank: int, world: int, folder: str, precision: str) -> list[Outcome]:
    plan = {"stages": CUTS[2]}
    whole = run(folder, world, plan, DROPOUT, saves=[4], precision=precision)
    return [whole, run(folder, world, plan, DROPOUT, resume=4, precision=precision)]


@pytest.mark.parametrize(
    "precision",
    [
        *("bf16-split", "bf16-sr", "luq4"),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("bf16-mixed", "bf16-true", "bf16-kahan", "dfp16")),
    ],
)
@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2])
def test_low_precisions_continue_to_the_same_bits(tmp_path: Path, precision: str, world: int) -> None:
    results = run_ranks(_in_precision, world, str(tmp_path), precision, init_group=False)
    for rank, (whole, continued) in enumerate(results):
        same(continued, whole, 4, rank)
