"""strategy="pipelined_bp" in one process computes the definition: compared with a plain loop and with golden values."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import run_ranks
from tests.strategies.pipelined_bp import wrong
from tests.strategies.pipelined_bp.models import BATCH, CUTS, Net, Outcome, Plan, data, emulated, strategy, trainer
from tests.strategies.pipelined_bp.oracle import Oracle

ORACLE_SAMPLES = 8 * BATCH
ORACLE_MODEL = {"dtype": torch.float64, "norm": "group"}
MITIGATIONS: dict[str, Plan] = {
    **{name: {"mitigation": name} for name in ("none", "sc", "lwp", "lwp_w", "lwp+sc", "lwp_w+sc")},
    **{name: {"mitigation": name} for name in ("stash", "spectrain", "shrink")},
    "lwp horizon 2": {"mitigation": "lwp", "horizon": 2},
    "sc horizon 1.5": {"mitigation": "sc", "horizon": 1.5},
    "lwp+sc horizon 2": {"mitigation": "lwp+sc", "horizon": 2},
    "lwp+sc stash": {"mitigation": "lwp+sc", "stash": True},
    "spectrain stash": {"mitigation": "spectrain", "stash": True},
    "lwp_w+shrink": {"mitigation": "lwp_w+shrink", "shrink_factor": 0.5},
    "lwp+sc 1F1B": {"mitigation": "lwp+sc", "in_flight": 1},
    "spectrain 1F1B": {"mitigation": "spectrain", "in_flight": 1},
    "lwp slack": {"mitigation": "lwp", "in_flight": 3},
}


def stages_of(net: nn.Module, stages: int) -> list[list[nn.Parameter]]:
    """Parameters by stage: ``pre`` is in the first, ``head`` in the last."""
    starts = [int(name.removeprefix("net.")) for name in CUTS[stages]]
    made: list[list[nn.Parameter]] = [[] for _ in range(stages)]
    for name, p in net.named_parameters():
        part, _, rest = name.partition(".")
        layer = int(rest.split(".")[0]) if part == "net" else -1
        made[-1 if part == "head" else sum(layer >= start for start in starts)].append(p)
    return made


def oracle(plan: Plan, optimizer: str = "sgd", stages: int = 3) -> Oracle:
    """Two epochs of the same micro-batches as in :func:`emulation`."""
    net = Net(norm="group").double()
    parts = {*plan["mitigation"].split("+"), *(["stash"] if plan.get("stash") else [])}
    base = {"sgd": 0.03, "adam": 3e-3}[optimizer]
    simulated = Oracle(
        net, stages_of(net, stages), parts, lr=lambda t: base * 0.95**t, adam=optimizer == "adam",
        k=plan.get("in_flight", 2), horizon=plan.get("horizon", 1.0), gamma=plan.get("shrink_factor", 0.9),
    )  # fmt: skip
    x, y = data(ORACLE_SAMPLES, dtype=torch.float64)
    for i, (rows, labels) in enumerate(list(zip(x.split(BATCH), y.split(BATCH), strict=True)) * 2):
        simulated.sample(i, rows, labels)
    return simulated


def emulation(
    plan: Plan, optimizer: str = "sgd", stages: int = 3, within: wrong.Within = contextlib.nullcontext
) -> Outcome:
    model = {**ORACLE_MODEL, "optimizer": optimizer}
    return emulated({**plan, "stages": CUTS[stages]}, model, samples=ORACLE_SAMPLES, shuffle=False, within=within)


def far_from(simulated: Oracle, outcome: Outcome) -> list[str]:
    """What is not equal up to the order in which float64 sums are made."""
    pairs = {name: (p.detach(), outcome.state[name]) for name, p in simulated.net.named_parameters()}
    ours, theirs = (torch.tensor(run.losses, dtype=torch.float64) for run in (outcome, simulated))
    pairs["losses"] = (theirs, ours)
    return [name for name, (a, b) in pairs.items() if not (a - b).norm() <= 1e-12 * a.norm()]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if "1F1B" in name or name.isidentifier() or "+" in name else [pytest.mark.long])
    for name in MITIGATIONS
])  # fmt: skip
def test_the_emulation_is_the_definition(name: str) -> None:
    assert far_from(oracle(MITIGATIONS[name]), emulation(MITIGATIONS[name])) == []


@pytest.mark.parametrize("name", ["none", "lwp", "lwp_w"])
def test_the_emulation_is_the_definition_with_adam(name: str) -> None:
    plan = {"mitigation": name}
    assert far_from(oracle(plan, "adam"), emulation(plan, "adam")) == []


@pytest.mark.parametrize("stages", [2, 4])
def test_the_emulation_is_the_definition_for_other_numbers_of_stages(stages: int) -> None:
    plan = {"mitigation": "lwp+sc"}
    assert far_from(oracle(plan, stages=stages), emulation(plan, stages=stages)) == []


def test_no_two_mitigations_are_the_same() -> None:
    """Else the comparisons above could not tell which one was computed."""
    ends = {name: tuple(oracle(plan).losses) for name, plan in MITIGATIONS.items()}
    assert len(set(ends.values())) == len(ends)


# Weights w_1 .. w_8 of one scalar that starts at 1, with loss w^2 / 2, learning rate 0.1, momentum 0.9 and D = 2.
GOLDEN = {
    "none": [0.9, 0.71, 0.439, 0.1051, -0.26641, -0.644669, -0.9956121, -1.28481989],
    "sc": [0.729, 0.3851, -0.02441, -0.419528, -0.7548373, -0.98414846, -1.081010526, -1.0353647651],
    "lwp": [0.9, 0.71, 0.439, 0.1251, -0.19041, -0.464069, -0.6600921, -0.75436989],
    "lwp+sc": [0.729, 0.3851, -0.02441, -0.365328, -0.5830773, -0.62468246, -0.499113726, -0.2470091451],
    "lwp_w+sc": [0.729, 0.3851, -0.02441, -0.272646, -0.3820497, -0.3037052, -0.168990702, -0.0164345577],
}


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _scalar(rank: int, world: int, mitigation: str) -> list[float]:
    """The scalar after every micro-batch; it is the first stage, and the second does nothing."""
    import lightning.pytorch as pl

    seen: list[float] = []

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(Scalar(), nn.Identity())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0]).square().sum() / 2  # type: ignore[no-any-return]

        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(float(self.net[0].weight))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    ones = torch.utils.data.TensorDataset(torch.ones(10, dtype=torch.float64))
    run = trainer(
        strategy(stages=["net.1"], mitigation=mitigation), devices=world, max_epochs=1, val_check_interval=1.0
    )
    run.fit(Task(), torch.utils.data.DataLoader(ones, batch_size=1))
    return seen


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("mitigation", GOLDEN)
def test_golden_values(mitigation: str, ranks: int) -> None:
    """Given to ten digits. After a micro-batch the first of two processes has made D updates fewer than one alone."""
    seen = run_ranks(_scalar, ranks, mitigation, init_group=False)[-1]
    assert seen[:2] == ([1.0, 1.0] if ranks == 2 else pytest.approx(GOLDEN[mitigation][:2]))
    updated = seen[2:] if ranks == 2 else seen[:8]
    assert updated == pytest.approx(GOLDEN[mitigation], rel=0, abs=0.5e-10)


# ---------------------------------------------------------------------------------------------------- wrong versions


@pytest.mark.parametrize(
    ("mutant", "mitigation"),
    [
        (wrong.one_update_less_late, "none"),
        (wrong.backward_with_the_forwards_weights, "none"),
        (wrong.no_prediction, "lwp"),
        (wrong.no_prediction, "spectrain"),
        (wrong.no_spike, "lwp+sc"),
        (wrong.not_shrunk, "shrink"),
        (wrong.no_versions_kept, "none"),
    ],
)
def test_the_definition_notices(mutant: wrong.Within, mitigation: str) -> None:
    plan = {"mitigation": mitigation}
    assert far_from(oracle(plan), emulation(plan, within=mutant))
