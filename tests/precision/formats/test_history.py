"""What layers remember: observed in a step, agreed on after it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_eff.functional import DelayedScale, HindsightMax
from lightning_eff.functional.numerics.flexpoint import Autoflex
from lightning_eff.functional.numerics.lognormal import FittedFormat
from lightning_eff.precision.formats.history import History, advance
from lightning_eff.precision.formats.shared_exponent import AgreedAutoflex
from tests.harness import run_ranks

CPU = torch.device("cpu")
ESTIMATES = {
    "hindsight": lambda: HindsightMax(0.5),
    "delayed": lambda: DelayedScale(history=3),
    "autoflex": Autoflex,
    "agreed autoflex": AgreedAutoflex,
}


class Recorder:
    def __init__(self) -> None:
        self.updates: list[tuple[float, ...]] = []

    def update(self, *observed: float) -> None:
        self.updates.append(observed)


def test_the_largest_of_a_step_arrives_once() -> None:
    seen, unseen, pair = History(Recorder()), History(Recorder()), History(Recorder(), numbers=2)
    for value in (1.0, 3.0, 2.0):
        seen.observe(torch.tensor(value))
    pair.observe(torch.tensor([-5.0, 1.0]))
    pair.observe(torch.tensor([-7.0, 2.0]))
    advance([seen, unseen, pair], CPU)
    advance([seen, unseen, pair], CPU)
    assert seen.estimate.updates == [(3.0,)]
    assert unseen.estimate.updates == []
    assert pair.estimate.updates == [(-5.0, 2.0)]


def test_what_is_forgotten_does_not_arrive_and_what_is_observed_is_a_copy() -> None:
    history, value = History(Recorder()), torch.tensor(1.0)
    history.observe(torch.tensor(9.0))
    history.forget()
    history.observe(value)
    value.fill_(8.0)
    advance([history], CPU)
    assert history.estimate.updates == [(1.0,)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_step_is_told_as_such(bad: float) -> None:
    history = History(Recorder())
    history.observe(torch.tensor(bad))
    history.observe(torch.tensor(1.0))
    advance([history], CPU)
    assert history.estimate.updates == [(math.inf,)]


@pytest.mark.parametrize("name", ESTIMATES)
def test_an_estimate_survives_a_broken_step_and_a_restart(name: str) -> None:
    estimate, restarted = ESTIMATES[name](), ESTIMATES[name]()
    for value in (0.5, 2.0, 1.0, 4.0, 0.25):
        estimate.update(value)
    before = estimate.state_dict()
    estimate.update(math.inf)
    estimate.update(math.nan)
    assert estimate.state_dict() == before
    restarted.load_state_dict(before)
    for value in (3.0, 0.1, 7.0):
        estimate.update(value)
        restarted.update(value)
    assert restarted.state_dict() == estimate.state_dict() != before


def test_a_fitted_format_survives_a_broken_step_and_a_restart() -> None:
    fitted, restarted = FittedFormat(6), FittedFormat(6)
    assert not fitted.fitted
    fitted.update(math.inf, math.inf)
    assert not fitted.fitted
    fitted.update(-30.0, 1.5)
    restarted.load_state_dict(fitted.state_dict())
    assert (restarted.format, restarted.fitted) == (fitted.format, True)
    fitted.update(-200.0, 1.0)  # below what float32 holds: placed as low as it goes
    assert fitted.format.min_subnormal == 2.0**-126


def test_the_first_scale_is_used_up_to_the_first_step_alone() -> None:
    """Ranks begin from tensors of their own; after the first step the scale is what the largest of all asks for."""
    small, large = AgreedAutoflex(), AgreedAutoflex()
    small.initialise(0.001)
    large.initialise(1.0)
    assert small.scale != large.scale
    small.update(1.0)
    large.update(1.0)
    assert small.state_dict() == large.state_dict()


def _advanced(rank: int, world_size: int) -> list[Any]:
    histories = [History(Recorder()) for _ in range(3)]
    histories[0].observe(torch.tensor(float(rank)))
    if rank == 1:
        histories[1].observe(torch.tensor(-2.0))
    advance(histories, CPU)
    return [history.estimate.updates for history in histories]


def test_ranks_agree_on_the_largest() -> None:
    for updates in run_ranks(_advanced, 2):
        assert updates == [[(1.0,)], [(-2.0,)], []]
