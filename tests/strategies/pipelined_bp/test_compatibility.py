"""What strategy="pipelined_bp" cannot do it refuses before step 0; what will go wrong it says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn

from lightning_eff.errors import ConfigurationError, EffWarning, NoEffectWarning, UnsupportedCombinationError
from lightning_eff.functional.staleness.stability import max_stable_lr
from lightning_eff.strategies import PipelinedBPStrategy
from lightning_eff.strategies.pipelined_bp.compatibility import refuse_optimizers, refuse_trainer, warn_if_unstable
from lightning_eff.strategies.pipelined_bp.mitigation import parse_mitigation
from tests.harness import run_ranks
from tests.strategies.pipelined_bp.models import CUTS, bits, differences, fit, loader, strategy, task, trainer

# ---------------------------------------------------------------------------------------------------- options

ALLOWED: dict[str, list[Any]] = {
    "module": [None, "net", ""],
    "stages": [None, "auto", "layers", 1, 4, ["net.1"], ("a", "b")],
    "mitigation": ["lwp+sc", "none", "stash+shrink"],
    "horizon": [None, 0, 1.5, 2],
    "micro_batch_size": [None, 1, 4],
    "stash": [False, True],
    "in_flight": [1, 2, 5],
    "shrink_factor": [0.5, 1],
    "curvature": [None, "measure", 0.1, 7],
    "on_nonfinite": ["raise", "warn"],
    "timeout_s": [0.5, 1800, 1e9],
}
ODD = [
    -1, 0, 2.5, -math.inf, math.inf, math.nan, 10**400, True, "", "yes", "none", b"net", [], ["net", 3], [None], {},
    {"a": 1}, object(), nn.Linear(1, 1), torch.tensor(2.0), torch.ones(2), np.ones(2), np.array(["auto"] * 2), 1j, int,
]  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_every_option_takes_what_it_says(name: str) -> None:
    for value in ALLOWED[name]:
        made = PipelinedBPStrategy(**{name: value})
        if name not in {"horizon", "mitigation", "shrink_factor", "stash", "timeout_s"}:
            assert getattr(made, name) == (tuple(value) if isinstance(value, list) else value)


values = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.text(max_size=3)))
TAKEN: dict[str, Any] = {
    **dict.fromkeys(("module", "mitigation"), str),
    **dict.fromkeys(("stages", "micro_batch_size", "in_flight"), int),
    **dict.fromkeys(("horizon", "shrink_factor", "curvature", "timeout_s"), int | float),
    "on_nonfinite": (),
}
"""What of :data:`ODD` an option may be."""


def refused_with(options: dict[str, Any]) -> str:
    """The message of the ConfigurationError, or nothing."""
    try:
        PipelinedBPStrategy(**options)
    except ConfigurationError as error:
        return str(error)
    return ""


@given(st.dictionaries(st.sampled_from(sorted(TAKEN)), values, min_size=1, max_size=3))
@settings(max_examples=150)
def test_any_option_makes_a_strategy_or_one_typed_error(options: dict[str, Any]) -> None:
    told = refused_with(options)
    assert not told or any(f"{name}=" in told for name in options)


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_odd_values_one_by_one(name: str) -> None:
    for value in ODD:
        told = refused_with({name: value})
        taken = isinstance(value, TAKEN[name]) and not isinstance(value, bool)
        if told:
            assert f"{name}=" in told
        else:
            assert taken, f"{name}={value!r}"
            assert isinstance(value, str) or 0 <= value < math.inf
    assert any(refused_with({name: value}) for value in ODD)


# ---------------------------------------------------------------------------------------------------- combinations


def fake_trainer(**changes: Any) -> Any:
    """What of a Trainer is looked at."""
    model: Any = nn.BatchNorm1d(2)
    model.automatic_optimization, model._compiler_ctx = changes.pop("automatic", True), changes.pop("ctx", None)
    plugin = SimpleNamespace(scaler=changes.pop("scaler", None))
    given_ = {"lightning_module": model, "accumulate_grad_batches": 1, "precision_plugin": plugin, "callbacks": []}
    return SimpleNamespace(**{**given_, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"automatic": False}, "manual optimization: .* Remove self.automatic_optimization"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2: every micro-batch is an update. Set it to 1"),
        ({"scaler": object()}, "precision='16-mixed': .* Use 'bf16-mixed'"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 4: 2})]}, "GradientAccumulationScheduler"),
        ({"callbacks": [StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging of a model with BatchNorm"),
        ({"ctx": {}}, "torch.compile of the whole LightningModule: .* Compile the layers"),
    ],
)
def test_a_combination_is_refused_with_what_to_do(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UnsupportedCombinationError, match=told):
        refuse_trainer(fake_trainer(**changes), num_stages=2, positions=2)
    refuse_trainer(fake_trainer(callbacks=[GradientAccumulationScheduler({0: 1})]), num_stages=2, positions=2)


def test_stages_need_at_least_one_process_each() -> None:
    with pytest.raises(
        ConfigurationError, match=r"stages=2 cannot be spread over 3 processes. Use Trainer\(devices=2\)"
    ):
        refuse_trainer(fake_trainer(), num_stages=2, positions=3)
    refuse_trainer(fake_trainer(), num_stages="layers", positions=3)
    with pytest.warns(NoEffectWarning, match="changes nothing with one stage in one process"):
        refuse_trainer(fake_trainer(), num_stages=1, positions=1)


def test_one_optimizer_and_none_that_calls_back() -> None:
    weights = [nn.Parameter(torch.ones(1))]
    sgd = torch.optim.SGD(weights, lr=0.1)
    refuse_optimizers([sgd])
    with pytest.raises(UnsupportedCombinationError, match="configure_optimizers returned 2"):
        refuse_optimizers([sgd, sgd])
    with pytest.raises(UnsupportedCombinationError, match="returned 0"):
        refuse_optimizers([])
    with pytest.raises(UnsupportedCombinationError, match="cannot be combined with LBFGS"):
        refuse_optimizers([torch.optim.LBFGS(weights)])


def _refused(rank: int, world: int, what: str) -> tuple[str, str, bool]:
    """A whole run: the error's type and message, and whether the model is untouched."""

    def configure_optimizers(self: Any) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=what == "nesterov")
        if what == "lbfgs":
            return torch.optim.LBFGS(self.parameters())
        return [sgd, torch.optim.SGD(self.parameters(), lr=0.1)] if what == "two optimizers" else sgd

    plans: dict[str, dict[str, Any]] = {
        "unknown module": {"module": "nett"},
        "too many": {"stages": 7},
        "unknown layer": {"stages": ["net.9"]},
        "one stage": {"stages": 1},
        "micro": {"micro_batch_size": 3},
    }
    model = task(hooks={"configure_optimizers": configure_optimizers})
    if what == "manual":
        model.automatic_optimization = False
    if what == "tied":
        model.net[4].linear.weight = model.net[1].linear.weight
    before = bits(dict(model.named_parameters()))
    options = {"accumulate_grad_batches": 2} if what == "accumulate" else {}
    run = trainer(strategy(**{"stages": CUTS[max(world, 2)], **plans.get(what, {})}), devices=world, **options)
    try:
        run.fit(model, loader(), loader(10))
    except Exception as error:  # noqa: BLE001 - its type is what is looked at
        untouched = before == bits(dict(model.named_parameters())) and run.global_step == 0
        return type(error).__name__, str(error), untouched and not model.rates
    return "", "", False


UNSUPPORTED, CONFIGURATION = "UnsupportedCombinationError", "ConfigurationError"
CASES = [
    ("manual", UNSUPPORTED, "manual optimization"),
    ("accumulate", UNSUPPORTED, "accumulate_grad_batches=2"),
    ("two optimizers", "UnsupportedCombinationError", "needs one optimizer"),
    ("lbfgs", UNSUPPORTED, "LBFGS"),
    ("nesterov", UNSUPPORTED, "nesterov"),
    ("unknown module", CONFIGURATION, "Did you mean 'net'?"),
    ("too many", CONFIGURATION, "has 6 layers"),
    ("unknown layer", CONFIGURATION, "'net.9' that net does not have"),
    ("tied", UNSUPPORTED, "'net.1.linear.weight' is used in the layers net.1 to net.4"),
    ("micro", CONFIGURATION, "micro_batch_size=3 does not divide"),
]


@pytest.mark.parametrize(("what", "kind", "told"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("world", [1, 2])
def test_it_is_refused_before_step_0_on_every_rank(world: int, what: str, kind: str, told: str) -> None:
    for found, message, untouched in run_ranks(_refused, world, what, init_group=False):
        assert found == kind, message
        assert told in message
        assert untouched


def test_fewer_stages_than_processes_are_refused() -> None:
    for found, message, untouched in run_ranks(_refused, 2, "one stage", init_group=False):
        assert (found, untouched) == (CONFIGURATION, True)
        assert "stages=1 cannot be spread over 2 processes" in message


# ---------------------------------------------------------------------------------------------------- stability


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
