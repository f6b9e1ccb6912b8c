"""Where the analysis says that a stage cannot train, strategy="pipelined_bp" says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.errors import EffWarning
from lightning_eff.functional.staleness.stability import max_stable_lr
from lightning_eff.strategies.pipelined_bp.compatibility import warn_if_unstable
from lightning_eff.strategies.pipelined_bp.mitigation import parse_mitigation
from tests.harness import run_ranks
from tests.strategies.pipelined_bp.models import CUTS, differences, fit, loader, strategy, task, trainer


def said(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, EffWarning)]


def warned(lr: float, momentum: float, delay: int, curvature: float | None, text: str = "lwp+sc") -> list[str]:
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr, momentum=momentum)
    mitigation = parse_mitigation(text, horizon=None, gamma=0.9, stash=False)
    return said(lambda: warn_if_unstable(sgd, mitigation, delays=[delay, 0], curvatures=[curvature, None]))


@pytest.mark.parametrize("text", ["none", "sc", "lwp", "lwp_w", "lwp+sc", "lwp_w+sc", "spectrain", "stash+sc"])
def test_a_rate_above_the_limit_is_told_and_none_below(text: str) -> None:
    analysed = text if text not in {"spectrain", "stash+sc"} else "none"
    limit = max_stable_lr(5.0, 4, 0.9, mitigation=analysed)  # type: ignore[arg-type]
    assert warned(limit * 0.99, 0.9, 4, 5.0, text) == []
    (told,) = warned(limit * 1.01, 0.9, 4, 5.0, text)
    assert "is not stable in stage 0, with a delay of 4 and a curvature of 5;" in told
    assert f"with {analysed!r} the limit is {limit:.3g}" in told
    assert "adaptive braking" in told
    assert warned(limit * 1.01, 0.9, 4, None, text) == []


def test_a_delay_that_nothing_helps_against_is_told() -> None:
    assert warned(1e-6, 0.75, 4, None) == []  # D (1 - m) = 1
    (told,) = warned(1e-6, 0.75, 6, None)
    assert "D(1-m) = 1.5" in told
    assert "adaptive braking (Venigalla" in told
    assert warned(1e-6, 0.0, 31, None) == [], "without momentum there is nothing to compensate for"
    assert len(warned(10.0, 0.5, 10, 5.0)) == 2, "both"


def test_the_stage_nearest_to_its_limit_is_told() -> None:
    """A late stage with a small delay may be the one that cannot train."""
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.05, momentum=0.5)
    mitigation = parse_mitigation("none", horizon=None, gamma=0.9, stash=False)
    (told,) = said(lambda: warn_if_unstable(sgd, mitigation, delays=[2, 1, 0], curvatures=[0.1, 100.0, 1.0]))
    assert "not stable in stage 1, with a delay of 1 and a curvature of 100;" in told


def test_of_other_optimizers_nothing_is_said() -> None:
    adam = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=100.0)
    mitigation = parse_mitigation("lwp", horizon=None, gamma=0.9, stash=False)
    assert said(lambda: warn_if_unstable(adam, mitigation, delays=[100], curvatures=[100.0])) == []


def _said_by_a_run(rank: int, world: int, curvature: Any) -> list[str]:
    def configure_optimizers(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=10.0, momentum=0.5)

    model = task(hooks={"configure_optimizers": configure_optimizers})
    run = trainer(strategy(stages="layers", curvature=curvature), devices=world, limit_train_batches=1, max_epochs=1)
    return said(lambda: run.fit(model, loader()))


@pytest.mark.parametrize("curvature", [3.0, "measure"])
def test_a_run_says_it_once(curvature: Any) -> None:
    last, first = run_ranks(_said_by_a_run, 2, curvature, init_group=False)
    much, unstable = last
    assert "D(1-m) = 5.0" in much
    assert "is not stable in stage" in unstable
    assert first == []


@pytest.mark.parametrize("world", [1, 2])
def test_measuring_curvature_changes_no_bit(world: int) -> None:
    model = {"dropout": 0.2, "norm": "batch"}
    plain, measured = (
        run_ranks(fit, world, {"stages": CUTS[2], "curvature": curvature}, model, init_group=False)
        for curvature in (None, "measure")
    )
    for without, with_it in zip(plain, measured, strict=True):
        assert differences([with_it], without) == []
