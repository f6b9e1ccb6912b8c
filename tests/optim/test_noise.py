"""What identifies a parameter for the noise of stochastic rounding: its name, in any optimizer, at any place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.errors import CheckpointError
from lightning_eff.optim import bf16_updates
from lightning_eff.optim.bf16.noise import Streams, noise_seed, stream_of

SIZE = 512


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16)) for _ in range(count)]


def made(params: Any, names: dict[Tensor, str] | None = None, seed: int = 3) -> torch.optim.SGD:
    return bf16_updates(torch.optim.SGD(params, lr=1e-3), update="sr", seed=seed, names=names)


def step(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """One step of equal gradients: what the parameters become differs by the noise alone."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = -torch.ones_like(p)
    optimizer.step()
    return [p.detach().clone() for p in params]


def test_parameters_of_two_optimizers_share_no_noise() -> None:
    one, two = parameters(2), parameters(2)
    ends = step(made(one, {p: f"first.{i}" for i, p in enumerate(one)}))
    ends += step(made(two, {p: f"second.{i}" for i, p in enumerate(two)}))
    assert not any(torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])


def test_a_name_is_the_same_noise_at_any_place_and_in_any_group() -> None:
    a, b, c = parameters(3)
    first = step(made([a, b, c], {a: "a", b: "b", c: "c"}))
    d, e, f = parameters(3)
    second = step(made([{"params": [f]}, {"params": [d, e]}], {d: "a", e: "b", f: "c"}))
    assert torch.equal(torch.stack(first), torch.stack([second[1], second[2], second[0]]))


@pytest.mark.parametrize("named", [True, False])
def test_a_group_that_is_added_or_removed_changes_nobody_elses_noise(named: bool) -> None:
    def run(change: bool) -> list[Tensor]:
        head, rest, late = parameters(3)
        names = {head: "head", rest: "rest", late: "late"} if named else {}
        optimizer = made([{"params": [head]}, {"params": [rest]}], names)
        step(optimizer)
        if change:
            optimizer.param_groups.pop(0)
            optimizer.add_param_group({"params": [late]})
            bf16_updates(optimizer, update="sr", names=names)
        step(optimizer)
        return [rest.detach(), late.detach()]

    (rest, _), (after, late) = run(False), run(True)
    assert torch.equal(rest, after)
    assert not torch.equal(late, after)


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="its optimizers take no names")
def test_names_given_to_the_optimizer_count() -> None:
    a, b = parameters(2)
    own = step(made([("b", a), ("a", b)]))
    c, d = parameters(2)
    assert torch.equal(torch.stack(own), torch.stack(step(made([c, d], {c: "b", d: "a"}))))


@pytest.mark.parametrize("names", [True, False])
def test_states_without_streams_go_on_by_place(names: bool) -> None:
    """Those of earlier versions: exactly the bits of that version, whatever names are known now."""
    whole = made(parameters(2))
    step(whole)
    saved = copy.deepcopy(whole.state_dict())
    assert saved["bf16"].pop("streams") == [0, 1]
    params = [nn.Parameter(p.detach().clone()) for group in whole.param_groups for p in group["params"]]
    continued = made(params, {p: str(i) for i, p in enumerate(params)} if names else None, seed=99)
    continued.load_state_dict(saved)
    assert torch.equal(torch.stack(step(continued)), torch.stack(step(whole)))


def test_saved_streams_count_more_than_names() -> None:
    before = parameters(2)
    whole = made(before, {p: f"old.{i}" for i, p in enumerate(before)})
    step(whole)
    params = [nn.Parameter(p.detach().clone()) for p in before]
    continued = made(params, {p: f"new.{i}" for i, p in enumerate(params)}, seed=99)
    continued.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert torch.equal(torch.stack(step(continued)), torch.stack(step(whole)))


def test_streams_of_another_number_of_parameters_are_refused() -> None:
    optimizer = made(parameters(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["bf16"]["streams"].append(7)
    with pytest.raises(CheckpointError, match="has 3 streams of random numbers for 2 parameters"):
        optimizer.load_state_dict(saved)


def test_numbers_are_the_same_everywhere_and_no_two_alike() -> None:
    assert stream_of("layer.weight") == 6191503076671015293
    streams, params = Streams(), parameters(4)
    streams[params[2]] = 0  # the first place is taken
    assert streams.of(params) == [1, 2, 0, 3]
    seeds = {noise_seed(seed, step, stream) for seed in range(9) for step in range(9) for stream in range(9)}
    assert len(seeds) == 729
