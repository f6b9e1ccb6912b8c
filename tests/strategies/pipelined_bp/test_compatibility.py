"""What strategy="pipelined_bp" cannot do it refuses before step 0."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn

from lightning_eff.errors import ConfigurationError, NoEffectWarning, UnsupportedCombinationError
from lightning_eff.strategies.pipelined_bp.compatibility import refuse_optimizers, refuse_trainer
from tests.harness import run_ranks
from tests.strategies.pipelined_bp.models import CUTS, bits, loader, strategy, task, trainer


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
