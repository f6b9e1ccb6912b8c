"""Parts of strategy="pipelined_bp": streams of random numbers, mitigations, versions of weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError
from lightning_eff.runtime.rng import USER, Randomness, seed_of_run
from lightning_eff.strategies.pipelined_bp.mitigation import PARTS, Mitigation, fitting, parse_mitigation, velocity
from lightning_eff.strategies.pipelined_bp.weights import Stage, Weights

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------- randomness


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002 - what third parties draw from


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    streams, found = Randomness(5, CPU), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        with streams.of(3, USER):
            found.append(drawn())
        with streams.of(3, 0):
            found.append((float(torch.rand(())),))  # type: ignore[arg-type]
    assert found[:2] == found[2:]


@pytest.mark.parametrize("stage", [USER, 0])
def test_outside_everything_is_as_if_nothing_had_been_drawn(stage: int) -> None:
    before = torch.get_rng_state()
    expected = drawn()
    torch.set_rng_state(before)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = (expected[0], random.random(), float(np.random.rand()))  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002

    def draw_and_fail() -> None:
        with Randomness(5, CPU).of(0, stage):
            torch.rand(100)
            if stage == USER:
                drawn()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        draw_and_fail()
    assert drawn() == expected


def test_every_micro_batch_and_stage_has_its_own() -> None:
    seen = []
    for seed in (0, 1, 2**64 - 1):
        for micro_batch in range(8):
            for stage in range(-1, 6):
                with Randomness(seed, CPU).of(micro_batch, stage):
                    seen.append(tuple(torch.randint(0, 2**31, (3,)).tolist()))
    assert len(set(seen)) == len(seen) == 3 * 8 * 7


def test_the_stream_inside_another_leaves_it_as_it_was() -> None:
    streams = Randomness(5, CPU)
    with streams.of(0, USER):
        expected = drawn(), drawn()
    with streams.of(0, USER):
        first = drawn()
        with streams.of(0, 3):
            torch.rand(7)
        assert (first, drawn()) == expected


def test_a_runs_seed_is_that_of_torch_and_drawing_it_draws_nothing() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert seed_of_run() == seed_of_run()
    assert torch.equal(torch.get_rng_state(), before)
    one = seed_of_run()
    torch.manual_seed(8)
    assert seed_of_run() != one


# ---------------------------------------------------------------------------------------------------- mitigation


def parsed(text: str = "lwp+sc", horizon: Any = None, gamma: Any = 0.9, stash: bool = False) -> Mitigation:
    return parse_mitigation(text, horizon=horizon, gamma=gamma, stash=stash)


@pytest.mark.parametrize("text", [*PARTS, "lwp+sc", "lwp_w+sc", "sc+stash+shrink", "sc+spectrain"])
def test_a_mitigation_is_read_and_said(text: str) -> None:
    found = parsed(text)
    assert str(found) == text
    assert found.horizon == 1.0
    assert found.gamma == (0.9 if "shrink" in text else 1.0)
    assert found.predicts == any(part in ("lwp", "lwp_w", "spectrain") for part in text.split("+"))


def test_stashing_may_be_asked_for_in_two_ways() -> None:
    assert parsed("lwp+sc", stash=True) == parsed("stash+sc+lwp")
    assert str(parsed("none", stash=True)) == "stash"
    assert str(parsed("stash").without("stash")) == "none"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"text": "lwpp"}, r"'lwpp' is none of .*Did you mean 'lwp'\?"),
        ({"text": ""}, "'' is none of"),
        ({"text": "lwp + sc"}, "'lwp ' is none of"),
        ({"text": "lwp+lwp_w"}, "at most one of"),
        ({"text": "spectrain+lwp"}, "at most one of"),
        ({"text": "none+sc"}, "'none' alone"),
        ({"text": "sc+sc"}, "at most one"),
        *(({"horizon": value}, "horizon=") for value in (-1, float("inf"), float("nan"), "1", [1])),
        *(({"gamma": value}, "shrink_factor=") for value in (0, -1, 1.5, float("nan"), "1", None)),
    ],
)
def test_what_is_no_mitigation_is_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        parsed(**given)


def optimizer(kind: Callable[..., Any], **options: Any) -> Any:
    return kind([nn.Parameter(torch.ones(2))], lr=0.1, **options)


SGD, ADAM, RMS = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop


@pytest.mark.parametrize(
    ("kind", "options", "asked", "left", "said"),
    [
        (SGD, {"momentum": 0.9}, "lwp+sc", "lwp+sc", ""),
        (SGD, {"momentum": 0.9}, "spectrain", "spectrain", ""),
        (SGD, {}, "lwp+sc", "none", "without momentum"),
        (SGD, {}, "spectrain+sc+stash", "stash", "without momentum"),
        (SGD, {}, "lwp_w+sc", "lwp_w", "without momentum"),
        (SGD, {}, "stash", "stash", ""),
        (SGD, {"momentum": 0.9, "nesterov": True}, "lwp", "lwp", ""),
        (ADAM, {}, "lwp+sc", "lwp", "with AdamW there is only lwp"),
        (torch.optim.Adam, {}, "spectrain", "spectrain", ""),
        (torch.optim.NAdam, {}, "sc", "none", "there is only none"),
        (RMS, {}, "lwp_w+sc", "lwp_w", "with RMSprop there is only lwp_w"),
        (RMS, {}, "shrink+stash", "stash+shrink", ""),
    ],
)
def test_an_optimizer_can_do_some_of_it(kind: Any, options: dict[str, Any], asked: str, left: str, said: str) -> None:
    found, told = fitting(parsed(asked), optimizer(kind, **options))
    assert str(found) == left
    assert told == "" if not said else said in told


@pytest.mark.parametrize(
    ("kind", "options", "asked", "told"),
    [
        (SGD, {"momentum": 0.9, "nesterov": True}, "sc", "this SGD has nesterov"),
        (SGD, {"momentum": 0.9, "dampening": 0.1}, "lwp+sc", "this SGD has dampening"),
        (SGD, {"momentum": 0.9, "maximize": True}, "lwp+sc", "this SGD has maximize"),
        (RMS, {}, "lwp+sc", r"mitigation='lwp' needs to know what RMSprop will subtract.*mitigation='lwp_w'"),
        (torch.optim.Adagrad, {}, "spectrain", "needs to know what Adagrad"),
    ],
)
def test_an_optimizer_that_cannot_is_refused(kind: Any, options: dict[str, Any], asked: str, told: str) -> None:
    with pytest.raises(UnsupportedCombinationError, match=told):
        fitting(parsed(asked), optimizer(kind, **options))


def _every_optimizer() -> dict[str, tuple[Any, dict[str, Any]]]:
    """All of torch's, as they are made without options, and options that change what a step is."""
    skip = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
    kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type) and kind not in skip}
    made = {name: (kind, {}) for name, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer)}
    ways: list[dict[str, Any]] = [{"maximize": True}, {"foreach": True}, {"weight_decay": 0.1}]
    sgd: list[dict[str, Any]] = [{"nesterov": True}, {"dampening": 0.3}, {"fused": True}]
    short = {"amsgrad": True, "betas": (0.9, 0.6)}  # so that the largest second moment is not the last
    adam: list[dict[str, Any]] = [short, {"fused": True}, {**short, "maximize": True}]
    for kind, options in ((SGD, [*ways, *sgd]), (torch.optim.Adam, [*ways, *adam]), (ADAM, [*ways, *adam])):
        made |= {f"{kind.__name__} {option}": (kind, option) for option in options}
    ways.append({"weight_decay": 0.1, "decoupled_weight_decay": True})
    return made | {f"NAdam {option}": (torch.optim.NAdam, option) for option in ways}


@pytest.mark.parametrize("name", _every_optimizer())
def test_the_velocity_is_what_a_step_subtracts_or_the_optimizer_is_refused(name: str) -> None:
    """The last of some steps: of equal gradients for NAdam, and for SGD when they have made the velocity what it stays.

    For Adam of any gradients, here ever smaller ones.
    """
    kind, options = _every_optimizer()[name]
    given = {"momentum": 0.9, **options} if kind is SGD else options
    weight = nn.Parameter(torch.linspace(-2, 2, 12).view(3, 4) + 0.1)
    made = kind([weight], lr=0.01, **given)
    if kind.__name__ not in ("SGD", "Adam", "AdamW", "NAdam"):
        with pytest.raises(UnsupportedCombinationError, match=f"needs to know what {kind.__name__} will subtract"):
            fitting(parsed("lwp"), made)
        return
    assert str(fitting(parsed("lwp"), made)[0]) == "lwp"
    start, coupled = weight.detach().clone(), not (kind is ADAM or "decoupled_weight_decay" in given)
    for step in range(400 if kind is SGD else 7):
        decay = given.get("weight_decay", 0.0) if coupled else 0.0
        wanted = torch.sign(start) * (1 + start.abs())  # what the moments are to see
        wanted = wanted * 0.6**step if kind in (torch.optim.Adam, ADAM) else wanted
        sign = -1 if given.get("maximize") else 1
        weight.grad = sign * (wanted - decay * weight.detach())
        before = weight.detach().clone()
        assert (velocity(weight, made, made.param_groups[0]) is None) == (step == 0)
        made.step()
    found = velocity(weight, made, made.param_groups[0])
    torch.testing.assert_close(found, (before - weight.detach()) / 0.01, rtol=2e-3, atol=2e-4)


def test_a_group_with_momentum_is_enough() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "momentum": m} for m in (0.0, 0.9)]
    assert fitting(parsed(), SGD(groups, lr=0.1)) == (parsed(), "")


# ---------------------------------------------------------------------------------------------------- weights


class HandMade:
    """Stages of one parameter each, whose value is the number of updates it has had: a version is seen as a number."""

    def __init__(self, stages: int = 3, in_flight: int = 2, mitigation: str = "none") -> None:
        self.parameters = [nn.Parameter(torch.zeros(1)) for _ in range(stages)]
        made = [Stage(s, stages, in_flight, [p]) for s, p in enumerate(self.parameters)]
        self.weights = Weights(made, parsed(mitigation), SGD(self.parameters, lr=1.0, momentum=0.9))

    def forward(self) -> list[float]:
        self.weights.before_forward()
        return self._seen()

    def backward(self) -> list[float]:
        self.weights.before_backward()
        return self._seen()

    def _seen(self) -> list[float]:
        seen = [p.item() for p in self.parameters]
        self.weights.after_pass()
        assert [p.item() for p in self.parameters] == [self.weights.updates] * len(seen), "the true ones are back"
        return seen

    def update(self, *, skipped: bool = False) -> None:
        def step() -> None:
            for p in self.parameters:
                p.data += 1

        if not skipped:
            self.weights.update(step)
            return
        self.weights.skip_update()
        for p in self.parameters:  # only that versions can be told apart
            p.data += 1


@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("skipped", [False, True])
def test_a_forward_pass_sees_the_version_of_its_delay_and_no_more_are_kept(in_flight: int, skipped: bool) -> None:
    """In one process every update is made at once, and what later forward passes are to see is kept."""
    made = HandMade(4, in_flight)
    for i in range(40):
        assert made.forward() == [max(0, i - stage.delay) for stage in made.weights.stages]
        assert made.backward() == [i] * 4
        made.update(skipped=skipped and i % 3 == 0)
        for stage in made.weights.stages:
            # With the weights at hand these are D_s + 1; they are what the next D_s forward passes see.
            assert sorted(stage.versions) == list(range(max(0, i + 1 - stage.delay), i + 1))
    assert [stage.delay for stage in made.weights.stages] == [in_flight * (3 - s) for s in range(4)]


def test_a_rank_of_a_pipeline_keeps_no_version() -> None:
    """Its gradients come D_s samples late, so that the weights at hand are those a forward pass is to see."""
    parameter = nn.Parameter(torch.zeros(1))
    weights = Weights([Stage(0, 2, 2, [parameter])], parsed("none"), SGD([parameter], lr=1.0))
    for i in range(10):
        weights.before_forward()
        assert parameter.item() == max(0, i - 2)
        weights.after_pass()
        if i >= 2:
            weights.before_backward()
            weights.after_pass()
            weights.update(lambda: parameter.data.add_(1))
        assert not weights.stages[0].versions
    # Drained, in two updates: the next forward passes see the versions they would have seen.
    for _ in range(2):
        weights.update(lambda: parameter.data.add_(1))
    assert parameter.item() == 10
    assert {v: w.item() for v, (w,) in weights.stages[0].versions.items()} == {8: 8, 9: 9}


@pytest.mark.parametrize("without", [[], [1], [0, 3, 4]], ids=str)
def test_a_stashed_version_is_seen_by_the_backward_pass_of_its_own_sample(without: list[int]) -> None:
    """Also where samples before it have no gradient and so no backward pass (a real pipeline of D_s = 2 and 0)."""
    made = HandMade(2, 2, "stash")
    stage, late = made.weights.stages[0], 2
    seen_by: dict[int, float] = {}
    for i in range(12):
        seen_by[i] = made.forward()[0]
        if i < late:
            continue
        oldest = i - late
        if oldest in without:
            made.update(skipped=True)
        else:
            assert made.backward()[0] == seen_by[oldest]
            made.update()
        assert len(stage.stashed) <= stage.delay + 1
        assert not made.weights.stages[1].stashed, "nothing is late there"


def test_what_is_saved_is_what_goes_on() -> None:
    made, other = HandMade(3, 2, "lwp_w"), HandMade(3, 2, "lwp_w")
    for _ in range(7):
        made.forward()
        made.backward()
        made.update()
    other.weights.load(7, made.weights.state())
    for p in other.parameters:
        p.data.fill_(7)
    for _ in range(8):
        assert made.forward() == other.forward()
        assert made.backward() == other.backward()
        made.update()
        other.update()
    with pytest.raises(KeyError):
        other.weights.load(7, made.weights.state()[:1])
