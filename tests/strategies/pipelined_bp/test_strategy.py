"""strategy="pipelined_bp" over several processes computes what it computes in one, bit for bit.

That one process computes the definition is shown in ``test_definition.py``. Where nothing is late both are
plain Lightning. Every comparison is then shown to notice wrong versions of the package.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.strategies.models import NAMESPACES
from tests.strategies.pipelined_bp import wrong
from tests.strategies.pipelined_bp.models import (
    BATCH,
    CUTS,
    STEPS,
    Outcome,
    Plan,
    bits,
    differences,
    emulated,
    pipelined,
)

# ---------------------------------------------------------------------------------------------------- many processes


def _no_loss_at_times(self: Any, batch: Any, batch_idx: int) -> Tensor | None:
    loss = F.cross_entropy(self(batch[0]), batch[1])
    self.log("loss", loss)
    return None if batch_idx in (3, 4, 9) else loss


def _freeze_the_first_layers(self: Any) -> None:
    """Nothing in the first stage is trained, and what it passes on needs no gradient."""
    for module in (self.pre, self.net[0], self.net[1]):
        module.requires_grad_(False)


# What makes a run special: (numbers of processes, the strategy's options, the model's, the Trainer's).
SCENARIOS: dict[str, tuple[tuple[int, ...], Plan, Plan, Plan]] = {
    "sgd": ((2, 3, 4), {}, {}, {}),
    "adamw": ((2, 3, 4), {"mitigation": "lwp"}, {"optimizer": "adamw"}, {}),
    "dropout and batch norm": ((2, 3), {}, {"dropout": 0.3, "norm": "batch"}, {}),
    "group norm": ((3,), {}, {"norm": "group"}, {}),
    "in_flight 1": ((2, 3), {"in_flight": 1}, {"dropout": 0.3}, {}),
    "in_flight 3": ((3,), {"in_flight": 3}, {"dropout": 0.3}, {}),
    "none": ((3,), {"mitigation": "none"}, {}, {}),
    "lwp_w+sc": ((3,), {"mitigation": "lwp_w+sc"}, {}, {}),
    "spectrain": ((3,), {"mitigation": "spectrain"}, {}, {}),
    "stash+shrink": ((3,), {"mitigation": "stash+shrink"}, {}, {}),
    "bf16-mixed": ((3,), {}, {}, {"precision": "bf16-mixed"}),
    "clip by norm": ((2, 3), {"stages": CUTS[4]}, {}, {"gradient_clip_val": 0.3}),
    "clip by value": ((2,), {}, {}, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
    "tuples": ((3,), {}, {"kind": "tuple"}, {}),
    "a walked list with a side argument": ((3,), {}, {"kind": "list", "dropout": 0.3}, {}),
    "no loss": ((2, 3), {}, {"hooks": {"training_step": _no_loss_at_times}}, {}),
    "first stage frozen": ((3,), {}, {"hooks": {"on_fit_start": _freeze_the_first_layers}}, {}),
    "epoch-wise": ((3,), {}, {"schedule": "epoch"}, {"max_epochs": 3}),
    "by a metric": ((3,), {}, {"schedule": "plateau"}, {"max_epochs": 3}),
    "by the training loss": (
        (2, 3),
        {},
        {"schedule": "plateau of the training loss", "norm": "group"},
        {"max_epochs": 3},
    ),
    "many validations": ((3,), {}, {"dropout": 0.3}, {"val_check_interval": 1, "max_epochs": 1}),
    "no validation": ((4,), {}, {"schedule": None}, {"limit_val_batches": 0}),
    "more stages than processes": ((2, 3), {"stages": CUTS[4]}, {"dropout": 0.3}, {}),
    "micro_batch_size": ((2,), {"micro_batch_size": 2}, {}, {}),
    "a stage per layer": ((2,), {"stages": "layers", "mitigation": "lwp_w"}, {}, {}),
}
ALWAYS = ("sgd", "dropout and batch norm", "clip by norm", "tuples", "bf16-mixed", "by a metric", "no validation")
"""Scenarios that every run of the tests has; the others are for the long ones."""
LONGER = [("sgd", 2), ("sgd", 4), ("dropout and batch norm", 2), ("clip by norm", 2)]
CASES = [
    pytest.param(name, ranks, marks=[] if name in ALWAYS and (name, ranks) not in LONGER else [pytest.mark.long])
    for name, (numbers, *_) in SCENARIOS.items()
    for ranks in numbers
]


def plan_of(name: str, ranks: int) -> tuple[Plan, Plan, Plan]:
    _, plan, model, options = SCENARIOS[name]
    return {"mitigation": "lwp+sc", "stages": CUTS[ranks], **plan}, model, options


@functools.cache
def emulation_of(name: str, ranks: int) -> Outcome:
    return emulated(*plan_of(name, ranks))


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_the_pipeline_is_the_emulation_to_the_bit(name: str, ranks: int) -> None:
    real, single = pipelined(ranks, *plan_of(name, ranks)), emulation_of(name, ranks)
    assert differences(real, single) == []
    assert not [told for outcome in real for told in outcome.warnings if "lr_scheduler" in told], "of their order"
    changes = SCENARIOS[name][2].get("schedule", "step") is not None
    assert (len({tuple(rates) for rates in single.rates}) > 1) == changes


def test_no_two_scenarios_are_the_same() -> None:
    """Each of them changes what is computed, or comparing pipeline and emulation under it would show nothing."""
    runs = [emulation_of(name, numbers[-1]) for name, (numbers, *_) in SCENARIOS.items()]
    assert len({repr(bits((run.state, run.losses))) for run in runs}) == len(SCENARIOS)


def test_the_other_package() -> None:
    plan, root = {"stages": CUTS[2]}, NAMESPACES[1]
    assert differences(pipelined(2, plan, root=root), emulated(plan)) == []


def _mixes_up(self: Any, batch: Any, batch_idx: int) -> Tensor:
    """Inputs are mixed on the first stage, labels on the last; each draws from all three global generators."""
    x, y = batch
    share, order = random.random(), torch.randperm(len(y))
    others = torch.from_numpy(np.random.permutation(len(y)))  # noqa: NPY002 - what users' code draws from
    self.extra = (share, order, others)  # the first stage comes no further than the stack
    out = self(share * x + (1 - share) * x[order])
    loss = share * F.cross_entropy(out, y[others]) + (1 - share) * F.cross_entropy(out, y[order][others])
    return loss + (out * torch.rand_like(out)).mean() * random.random()


@pytest.mark.parametrize("ranks", [2, 3])
def test_first_and_last_stage_draw_the_same(ranks: int) -> None:
    plan, model = {"stages": CUTS[ranks]}, {"hooks": {"training_step": _mixes_up}, "dropout": 0.3}
    options = {"limit_val_batches": 0}
    real, single = pipelined(ranks, plan, model, options), emulated(plan, model, options)
    assert differences(real, single) == []
    assert bits(real[0].extra) == bits(real[-1].extra) == bits(single.extra)
    nothing_drawn = emulated(plan, None, options)
    assert bits(single.generators) == bits(nothing_drawn.generators), "and outside of it nothing was drawn"


# ---------------------------------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed", "gradient_clip_val": 0.3}], ids=["32", "bf16"])
def test_one_stage_on_one_process_is_plain_lightning(options: Plan) -> None:
    model = {"dropout": 0.3, "norm": "batch"}
    plain = emulated(None, model, options)
    for plan in ({"stages": 1}, {"stages": None, "module": None}):
        ours = emulated(plan, model, options)
        assert differences([ours], plain) == []
        assert sum("changes nothing" in told for told in ours.warnings) == 1
    assert len(plain.losses) == STEPS


def _the_last_stage_alone(self: Any) -> Any:
    """Learning rate 0 for all stages but the last one of three."""
    last = {id(p) for module in (self.net[4], self.net[5], self.head) for p in module.parameters()}
    parts = [p for p in self.parameters() if id(p) not in last], [p for p in self.parameters() if id(p) in last]
    groups = [{"params": parts[0], "lr": 0.0}, {"params": parts[1]}]
    return torch.optim.SGD(groups, lr=0.03, momentum=0.9, weight_decay=1e-2)


@pytest.mark.parametrize("mitigation", ["lwp+sc", "lwp_w+sc", "stash+shrink"])
def test_a_stage_without_delay_is_plain_lightning(mitigation: str) -> None:
    """With nothing before it in motion, the last stage of a pipeline trains as if there were none."""
    model, plan = (
        {"hooks": {"configure_optimizers": _the_last_stage_alone}},
        {"mitigation": mitigation, "stages": CUTS[3]},
    )
    plain = replace(emulated(None, model), moments={})  # momentum of what does not move may be shrunk
    for ours in (emulated(plan, model), pipelined(3, plan, model)[0]):
        assert differences([replace(ours, moments={})], plain) == []


@pytest.mark.parametrize("mitigation", ["lwp+sc", "lwp_w+sc"])
def test_a_horizon_of_zero_is_no_mitigation(mitigation: str) -> None:
    off = emulated({"stages": CUTS[3], "mitigation": mitigation, "horizon": 0})
    assert differences([off], emulated({"stages": CUTS[3], "mitigation": "none"})) == []


def _count(self: Any, *_: Any) -> None:
    """Real steps of the optimizer and the scheduler before this micro-batch."""
    now = (len(self.rates), self.lr_schedulers().last_epoch)
    self.extra = [*getattr(self, "extra", []), now]


@pytest.mark.parametrize("in_flight", [1, 2])
def test_nothing_advances_while_the_pipeline_fills(in_flight: int) -> None:
    plan = {"stages": CUTS[3], "mitigation": "lwp", "in_flight": in_flight}
    model = {"optimizer": "adamw", "hooks": {"on_train_batch_start": _count}}
    real = pipelined(3, plan, model, {"limit_val_batches": 0, "max_epochs": 1}, samples=STEPS * BATCH)
    for rank, outcome in enumerate(real):
        late = in_flight * rank  # rank 0 has the last stage
        assert outcome.extra == [(max(0, i - late),) * 2 for i in range(STEPS)]
        assert {float(state["step"]) for state in outcome.moments.values()} == {float(STEPS)}
        assert len(outcome.rates) == outcome.trainer["global_step"] == STEPS


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_staleness_is_the_first_stages_delay(ranks: int, validate: bool) -> None:
    """Also with more stages than processes, and after a drain: later forward passes see versions as old as before."""
    options = {"log_every_n_steps": 10, "max_epochs": 1, "limit_val_batches": int(validate)}
    for outcome in pipelined(ranks, {"stages": CUTS[3]}, None, options, samples=3 * 10 * BATCH)[:1]:
        assert outcome.figures["eff/pipelined_bp/staleness"] == 4


# ---------------------------------------------------------------------------------------------------- wrong versions


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (wrong.one_update_less_late, "sgd"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (wrong.backward_with_the_forwards_weights, "none"),
                (wrong.no_prediction, "adamw"),
                (wrong.scheduler_at_once, "sgd"),
                (wrong.clip_over_all_stages, "clip by norm"),
                (wrong.no_versions_kept, "sgd"),
                (wrong.no_streams, "many validations"),
                (wrong.update_without_a_gradient, "adamw"),
            )
        ),
    ],
)
def test_the_comparison_with_the_emulation_notices(mutant: wrong.Within, name: str) -> None:
    """The pipeline is wrong and the emulation is right; what is wrong in both is for the definition to find."""
    plan = plan_of(name, 3)
    assert differences(pipelined(3, *plan, within=mutant), emulation_of(name, 3)) != []
