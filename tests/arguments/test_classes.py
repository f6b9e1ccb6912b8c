"""Every public class, given anything: it is made and can be used, or says why not in an error of ours.

What an option may be is tried one by one from a pool of valid, nearly valid and wild values, then several at once,
about 300 calls a class.
"""

from __future__ import annotations

import contextlib
import importlib
import random
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff import LowPrecision
from lightning_eff.errors import EffError
from lightning_eff.methods import METHODS
from lightning_eff.precision.layers.convert import convert
from tests.arguments.classes import CALLS, accepted, every_class, made, options_of, pool, public, used
from tests.arguments.values import WILD
from tests.harness import run_ranks


@every_class
def test_each_option_takes_anything_or_says_why_not(cls: type[Any]) -> None:
    taken = 0
    for name in options_of(cls):
        for value in pool(cls, name, WILD):
            thing, told = made(cls, {name: value})
            if thing is None:
                assert len(told) < 700, "a message for people"
                assert name in told or "method" in told or name in {"delay", "options"}, told
            else:
                taken += 1
                used(thing)
    assert taken >= len(options_of(cls)), "each takes something"


@every_class
def test_several_options_at_once(cls: type[Any], seed: int) -> None:
    draw = random.Random(f"{cls.__name__} {seed}")
    names = options_of(cls)
    pools = {name: pool(cls, name, WILD) for name in names}
    for _ in range(CALLS):
        chosen = draw.sample(names, k=draw.randint(1, min(4, len(names))))
        thing, _ = made(cls, {name: draw.choice(pools[name]) for name in chosen})
        if thing is not None:
            used(thing)


CONVERTING = [cls for cls in public("precision") if hasattr(cls, "options_class")]


@pytest.mark.parametrize("cls", CONVERTING, ids=lambda c: c.__name__)
def test_what_a_precision_has_taken_trains(cls: type[Any]) -> None:
    for options in accepted(cls, 12):
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        taken = made(cls, options)[0].options
        try:
            convert(model, taken)
        except EffError:  # a pattern that matches no layer
            continue
        for _ in range(2):
            model(torch.randn(6, 5)).square().mean().backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def _train(rank: int, world: int, kind: str, name: str) -> int:
    """How many of 15 objects trained two steps; the others said why not before the first."""
    from tests.state.runs import quiet_trainer, task

    cls = getattr(importlib.import_module(f"lightning_eff.{kind}"), name)
    fixed = {"process_group_backend": "gloo"} if kind == "strategies" else {}
    trained = 0
    for options in accepted(cls, 15):
        thing, _ = made(cls, {**options, **fixed})
        given = {"strategy": thing} if kind == "strategies" else {"callbacks": [thing]}
        if name == "LUQFineTuning":
            given["precision"] = "luq4"
        with contextlib.suppress(EffError):
            quiet_trainer(max_steps=2, accumulate_grad_batches=1, **given).fit(task("sgd"))
            trained += 1
    return trained


@pytest.mark.long
@pytest.mark.parametrize(("kind", "cls"), [(k, c) for k in ("strategies", "callbacks") for c in public(k)], ids=str)
def test_what_else_has_been_taken_trains(kind: str, cls: type[Any]) -> None:
    assert run_ranks(_train, 1, kind, cls.__name__, init_group=False)[0] > 0


def test_the_options_of_a_method_by_callback() -> None:
    """Names and values of ``LowPrecision(options=...)`` are looked at when it is made."""
    for info in METHODS.values():
        if info.kind != "precision":
            continue
        for name in options_of(info.load_mixin()):
            for value in WILD:
                thing, told = made(LowPrecision, {"method": info.name, "options": {name: value}})
                assert thing is not None or name in told
    for name in (*WILD, "levles"):
        if type(name).__hash__ is not None and not isinstance(name, slice | torch.Tensor):
            thing, told = made(LowPrecision, {"options": {name: 1}})
            assert thing is None
            assert told
    assert "Did you mean 'levels'?" in made(LowPrecision, {"options": {"levles": 8}})[1]
