"""Mitigations as they are written, what an optimizer can do of them, and the velocity it goes on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError
from lightning_eff.strategies.pipelined_bp.mitigation import PARTS, adapt_to_optimizer, velocity
from tests.strategies.pipelined_bp.handmade import ADAM, RMS, SGD, optimizer, parsed


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
    found, told = adapt_to_optimizer(parsed(asked), optimizer(kind, **options))
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
        adapt_to_optimizer(parsed(asked), optimizer(kind, **options))


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
            adapt_to_optimizer(parsed("lwp"), made)
        return
    assert str(adapt_to_optimizer(parsed("lwp"), made)[0]) == "lwp"
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
    assert adapt_to_optimizer(parsed(), SGD(groups, lr=0.1)) == (parsed(), "")
