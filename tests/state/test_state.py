"""What a checkpoint holds of a method is looked at before it is used: taken as a whole, or refused by name.

Every key of a real state (``tests/data``) is damaged in some twenty ways. What comes of it is a CheckpointError that
leaves everything as it was, or one of the few things :data:`TAKEN` documents.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.errors import CheckpointError, EffError, EffWarning
from lightning_eff.functional import DelayedScale, HindsightMax
from lightning_eff.functional.numerics.flexpoint import Autoflex
from lightning_eff.functional.numerics.lognormal import FittedFormat
from lightning_eff.methods import METHODS
from lightning_eff.optim import bf16_updates
from lightning_eff.precision import FP8Precision
from tests.harness import run_ranks
from tests.state.runs import DATA, RUNS, cut_of, fit, task

every_run = pytest.mark.parametrize("name", RUNS)


def state_of(name: str) -> Any:
    """What the file of a method holds of it."""
    found = torch.load(DATA / f"{name}.ckpt", weights_only=True)
    for key in RUNS[name].path:
        found = found[key]
    return found


# ------------------------------------------------------------------------------------------------- without a Trainer


def loader_of(name: str) -> tuple[Callable[[Any], None], Callable[[], Any]]:
    """What loads a state into a new object of the method, and what tells the state of that object."""
    if name.startswith("bf16"):
        shapes = [group.shape for group in _parameters()]
        weights = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
        kind = torch.optim.Adam if RUNS[name].optimizer == "adam" else torch.optim.SGD
        optimizer = bf16_updates(kind(weights, lr=0.01), update=name.removeprefix("bf16-"))  # type: ignore[arg-type]
        return optimizer.load_state_dict, lambda: copy.deepcopy(optimizer.state_dict())
    options = RUNS[name].options()
    if "strategy" in options:
        strategy, key = options["strategy"], RUNS[name].path[0]
        strategy._trainer = SimpleNamespace(global_step=0, max_steps=-1)
        names = ("_steps", "_tallies", "_search", "_saved")
        return (
            lambda state: strategy.load_optimizer_state_dict({key: state, "optimizer_states": []}),
            lambda: copy.deepcopy({name: getattr(strategy, name, None) for name in names}),
        )
    made = (options.get("plugins") or options["callbacks"])[0]
    return made.load_state_dict, lambda: copy.deepcopy(made.state_dict())


def _parameters() -> list[torch.Tensor]:
    return list(torch.load(DATA / "bf16-split.ckpt", weights_only=True)["state_dict"].values())


def same(a: Any, b: Any) -> bool:
    """Equal, also where there are tensors and NaN."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype is b.dtype and torch.equal(a, b)
    return bool(a == b) or (a != a and b != b)  # noqa: PLR0124 - NaN


DELETE = object()
DAMAGE: dict[str, Any] = {
    "delete": DELETE, "none": None, "text": "banana", "number as text": "7", "bytes": b"7", "true": True, "minus 1": -1,
    "minus half": -0.5, "half": 0.5, "nan": math.nan, "inf": math.inf, "huge": 10**400, "long": 2**70, "empty list": [],
    "empty mapping": {}, "wrapped": "WRAP", "list of text": ["a", "b"], "mapping": {"a": 1}, "number": 7, "set": {1},
    "0-d tensor": torch.tensor(1.0), "tensor": torch.ones(2), "nan tensor": torch.full((2,), math.nan), "object": print,
}  # fmt: skip

TAKEN: dict[str, list[str]] = {
    # an entry less: layers and parameters that are not remembered begin anew (a run warns); a plain optimizer's state
    "delete": [
        "memory/net.*", "memory/net.?/*", "scales/*", "history/0", "ranks/0/net.0", "layers/net.0",
        "fp8-delayed/memory", "measured", "bf16", "state/0/*", "start_lrs/0", "layers/0", "versions/*",
        "versions/*/0", "previous/0",
    ],
    "empty mapping": ["memory", "memory/net.?", "scales", "ranks/0", "gradient_*/layers", "versions"],
    "mapping": ["scales"],
    "empty list": ["flexpoint16/memory/*/*/history", "weights/memory/*/history", "start_lrs", "versions/*", "previous"],
    "none": ["measured", "fp6-fit/seed", "previous"],
    "true": ["measured", "fitted", "initialised"],
    # other names: the pipeline finds other layers, and says that its delays begin anew
    "text": ["pipelined_bp/layers/0"],
    "number as text": ["pipelined_bp/layers/0"],
    # tensors of other shapes are refused with the first batch, when it is known what the stages hold
    "0-d tensor": ["versions/*/0", "previous/0"],
    "tensor": ["versions/*/0", "previous/0"],
    # numbers in range
    "nan": ["luq4/*/*/*/value", "threshold", "sigma"],
    "inf": ["threshold_s"],
    "minus 1": ["bias", "correction"],
    "minus half": ["correction"],
    "number": [
        "seed", "luq4/calls", "fp8-fit/calls", "flexpoint16/calls", "0/*/calls", "steps", "computed", "dropped",
        "samples", "in_flight", "start_step", "overflows", "next_fit", "fits", "bias", "correction", "threshold",
        "threshold_s", "sigma", "sigma_log2", "value", "max_abs", "history/0", "*_lrs/0", "skipped",
    ],
    "half": [
        "scale", "scales/*", "correction", "threshold", "threshold_s", "sigma", "sigma_log2", "zeros", "value",
        "max_abs", "history/0", "*_lrs/0",
    ],
    "long": [
        "scale", "scales/*", "threshold", "threshold_s", "sigma", "sigma_log2", "value", "max_abs", "history/0",
        "*_lrs/0",
    ],
}  # fmt: skip
"""Damage -> where it leaves a state that a run can be in; everywhere else it is a CheckpointError."""


def places(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to everything in a state; of entries that are alike the first one."""
    if path:
        yield path
    if isinstance(state, dict):
        alike = len({str(type(value)) for value in state.values()}) == 1 and len(state) > 2 and path
        for key in list(state)[: 1 if alike else None]:
            yield from places(state[key], (*path, key))
    elif isinstance(state, list) and state:
        yield from places(state[0], (*path, 0))


def damaged(state: Any, path: tuple[Any, ...], damage: Any) -> Any:
    """A copy of the state with one thing in it damaged."""
    copied = copy.deepcopy(state)
    parent = copied
    for key in path[:-1]:
        parent = parent[key]
    if damage is DELETE:
        del parent[path[-1]]
    else:
        parent[path[-1]] = [parent[path[-1]]] if isinstance(damage, str) and damage == "WRAP" else damage
    return copied


def is_ours(name: str, path: tuple[Any, ...]) -> bool:
    """Of an optimizer's state torch looks after its own part."""
    return not name.startswith("bf16") or "bf16" in path or path[-1] in {"lo", "compensation"}


@every_run
@pytest.mark.filterwarnings("ignore::lightning_eff.errors.EffWarning")
def test_each_damage_is_refused_or_documented_and_nothing_is_half_loaded(name: str) -> None:
    state, tried = state_of(name), 0
    for path in filter(lambda path: is_ours(name, path), places(state)):
        where = PurePosixPath(name, *map(str, path))
        for damage, value in DAMAGE.items():
            load, tell = loader_of(name)
            load(copy.deepcopy(state))
            before, tried = tell(), tried + 1
            taken = any(where.match(pattern) for pattern in TAKEN.get(damage, []))
            told = ""
            try:
                load(damaged(state, path, value))
            except CheckpointError as error:
                told = str(error)
            assert taken == (not told), f"{where}, {damage}: {told or 'was taken'}"
            assert taken or same(before, tell()), f"{where}, {damage} was half loaded"
            assert len(told) < 900
    assert tried >= len(DAMAGE)


@every_run
@pytest.mark.parametrize("state", [None, "abc", b"abc", 3, [], {1: 2}, torch.ones(2), {}, [{}]], ids=repr)
def test_what_is_no_state_at_all_is_refused(name: str, state: Any) -> None:
    load, tell = loader_of(name)
    before = tell()
    with pytest.raises(CheckpointError, match="state"):
        load(copy.deepcopy(state))
    assert same(before, tell())


@every_run
def test_a_real_state_is_taken_and_given_back(name: str) -> None:
    load, tell = loader_of(name)
    state = state_of(name)
    load(copy.deepcopy(state))
    if not {"DropComputeStrategy", "PipelinedBPStrategy"} & set(RUNS[name].path):
        assert given_back(state, tell())


def given_back(state: Any, found: Any) -> bool:
    """Whether all that was in a state is in what is saved again, which may have more: what older versions left out."""
    if isinstance(state, dict):
        return all(key in found and (key == "param_groups" or given_back(state[key], found[key])) for key in state)
    return same(state, found)


@every_run
def test_newer_keys_are_warned_of_and_left_out(name: str) -> None:
    state = state_of(name)
    owner = state["bf16"] if name.startswith("bf16") else state
    owner["of_tomorrow"] = 3
    load, tell = loader_of(name)
    with pytest.warns(EffWarning, match=r"leaves out: of_tomorrow\. It was made by a newer version"):
        load(state)
    assert "of_tomorrow" not in str(tell())


@every_run
def test_the_row_declares_what_is_saved(name: str) -> None:
    state = state_of(name)
    if name in METHODS and not name.startswith("bf16"):
        assert set(state) == set(METHODS[name].state_keys)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(METHODS[name].read_state(state), state)


# ------------------------------------------------------------------------------------------------------------ by fields


@pytest.mark.parametrize(
    ("made", "other"),
    [
        (lambda: Autoflex(length=3), [lambda flex: flex.initialise(1.0), lambda flex: flex.update(2.0)]),
        (lambda: DelayedScale(history=3), [lambda scale: scale.update(2.0), lambda scale: scale.update(0.5)]),
        (HindsightMax, [lambda estimate: estimate.update(4.0)]),
        (lambda: FittedFormat(6), [lambda fitted: fitted.update(-20.0, 3.0)]),
    ],
    ids=["Autoflex", "DelayedScale", "HindsightMax", "FittedFormat"],
)
def test_estimates_by_themselves_take_a_state_as_a_whole_or_not_at_all(made: Any, other: Any) -> None:
    estimate = made()
    for change in other:
        change(estimate)
    state = estimate.state_dict()
    restored = made()
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    fresh = made()
    before = fresh.state_dict()
    for key in state:
        for value in ("banana", -1.5, math.inf, [None], torch.tensor(1.0), {}):
            with pytest.raises(CheckpointError, match=type(estimate).__name__):
                fresh.load_state_dict({**state, key: value})
            assert same(fresh.state_dict(), before)
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            fresh.load_state_dict({k: v for k, v in state.items() if k != key})


def test_the_state_of_another_width_is_refused_by_name() -> None:
    wide = FittedFormat(8)
    wide.update(-20.0, 20.0)
    assert wide.format.exponent_bits > 5
    with pytest.raises(
        CheckpointError, match=r"exponent_bits=\d is not allowed; it must be a whole number from 0 to 5"
    ):
        FittedFormat(6).load_state_dict(wide.state_dict())


def test_the_error_names_method_key_found_expected_and_what_to_do() -> None:
    load, _ = loader_of("luq4")
    state = state_of("luq4")
    state["memory"]["net.2"]["grad"]["value"] = -3.0
    with pytest.raises(CheckpointError) as caught:
        load(state)
    for part in ("luq4", "memory['net.2']['grad']['value']=-3.0", "0 or more", RUNS["luq4"].path[0]):
        assert part in str(caught.value)
    assert isinstance(caught.value, EffError | RuntimeError)


# ------------------------------------------------------------------------------------------------------ with a Trainer


def advice(told: str) -> str:
    """The statement an error says to run."""
    return told.split("weights_only=True); ")[1].split("; torch.save", maxsplit=1)[0]


@pytest.mark.parametrize("damage", [torch.ones(3), torch.zeros(1, dtype=torch.int16), None, "lo"], ids=repr)
def test_the_advice_about_missing_bits_can_be_followed(damage: Any) -> None:
    state = state_of("bf16-split")
    state["state"][2]["lo"] = damage
    load, tell = loader_of("bf16-split")
    with pytest.raises(CheckpointError, match=r"state\[2\]\['lo'\]") as caught:
        load(copy.deepcopy(state))
    exec(advice(str(caught.value)), {"checkpoint": {"optimizer_states": [state]}})
    with pytest.warns(EffWarning, match="lacks 'lo' of the parameters.*not exact"):
        load(state)
    assert tell()["bf16"] == state["bf16"]


def test_damaged_streams_of_random_numbers_are_refused() -> None:
    optimizer = bf16_updates(torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], lr=0.1), update="sr")
    state = optimizer.state_dict()
    assert state["bf16"]["streams"] == [0]
    for streams in ([], [0, 1], [-1], [2**63], [0.5], ["0"], [True], {0: 1}, "0", 3, torch.zeros(1)):
        state["bf16"]["streams"] = streams
        with pytest.raises(CheckpointError, match="streams"):
            optimizer.load_state_dict(copy.deepcopy(state))
    assert optimizer.state_dict()["bf16"]["streams"] == [0]


def converted(name: str) -> Any:
    """The plugin of a run, its model converted."""
    (plugin,) = RUNS[name].options()["plugins"]
    plugin.convert_module(task("sgd"))
    return plugin


def test_layers_that_were_renamed_are_named() -> None:
    state = state_of("luq4")
    state["memory"] = {"body.2": state["memory"]["net.2"]}
    with pytest.warns(
        EffWarning, match=r"remembers nothing of 1 layers: net\.2\. It remembers others.*body\.2.*not exact"
    ):
        converted("luq4").load_state_dict(state)


def test_another_variant_of_a_method_goes_on() -> None:
    """From fp8 to fp8-delayed there is nothing to remember yet; back again, what was remembered is left out."""
    with pytest.warns(EffWarning, match=r"fp8-delayed: the checkpoint remembers nothing of 1 layers"):
        converted("fp8-delayed").load_state_dict({"phase": "quantized"})
    plugin = FP8Precision()
    plugin.load_state_dict(state_of("fp8-delayed"))
    assert plugin.state_dict() == {"phase": "quantized"}


def test_keys_of_a_subclass_are_its_own() -> None:
    class Mine(FP8Precision):  # type: ignore[misc,valid-type]
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "mine": 3}

    Mine().load_state_dict(Mine().state_dict())


def test_another_number_of_ranks_is_said() -> None:
    state = state_of("gradient_pruning")
    state["ranks"] = state["ranks"] * 3
    load, tell = loader_of("gradient_pruning")
    with pytest.warns(EffWarning, match="is of 3 ranks, this run has 1.*not exact"):
        load(state)
    assert tell()["ranks"] == state["ranks"][:1]


def _resume(rank: int, world: int, name: str, path: str, steps: int, again: str) -> dict[str, Any]:
    """Resume from a file; what the run says, and (where it trained) another file of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(name, steps, resume=path)
    trainer.save_checkpoint(again)
    said = [str(w.message) for w in caught if issubclass(w.category, EffWarning)]
    weights = torch.cat([p.detach().double().reshape(-1) for p in trainer.lightning_module.parameters()])
    return {"step": trainer.global_step, "finite": bool(weights.isfinite().all()), "said": said}


@every_run
def test_a_checkpoint_of_today_loads_for_good(name: str, tmp_path: Path) -> None:
    again, cut = tmp_path / "again.ckpt", cut_of(name)
    (result,) = run_ranks(_resume, 1, name, str(DATA / f"{name}.ckpt"), cut + 2, str(again), init_group=False)
    assert result == {"step": cut + 2, "finite": True, "said": []}
    assert RUNS[name].path[0] in torch.load(again, weights_only=True)
    if name != "pipelined_bp":  # its state is taken with the first batch
        (result,) = run_ranks(_resume, 1, name, str(DATA / f"{name}.ckpt"), cut, str(again), init_group=False)
        found = torch.load(again, weights_only=True)
        for key in RUNS[name].path:
            found = found[key]
        assert given_back(state_of(name), found)


def _damage_and_mend(rank: int, world: int, name: str, folder: str) -> list[str]:
    """Damage a file; follow the advice of the error; resume. What was said on the way."""
    path = f"{folder}/damaged.ckpt"
    checkpoint = torch.load(DATA / f"{name}.ckpt", weights_only=True)
    *above, last = RUNS[name].path
    owner = checkpoint
    for key in above:
        owner = owner[key]
    if name.startswith("bf16"):
        owner[last]["bf16"] = {"update": "banana"}
    else:
        owner[last] = {"phase": "banana"}
    torch.save(checkpoint, path)
    try:
        fit(name, cut_of(name) + 2, resume=path)
    except CheckpointError as error:
        told = str(error)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    exec(advice(told), {"checkpoint": checkpoint})
    torch.save(checkpoint, path)
    return [told, *_resume(0, 1, name, path, cut_of(name) + 2, f"{folder}/again.ckpt")["said"]]


@every_run
def test_the_advice_of_the_error_can_be_followed(name: str, tmp_path: Path) -> None:
    ((told, *said),) = run_ranks(_damage_and_mend, 1, name, str(tmp_path), init_group=False)
    assert "Nothing of it was loaded" in told
    assert said == []
