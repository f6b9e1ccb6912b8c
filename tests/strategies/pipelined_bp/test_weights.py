"""Versions of weights: which one a pass sees, and which are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_eff.strategies.pipelined_bp.weights import Stage, Weights
from tests.strategies.pipelined_bp.handmade import SGD, HandMade, parsed


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
