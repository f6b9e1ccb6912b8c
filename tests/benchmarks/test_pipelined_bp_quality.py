"""The benchmark of the accuracy of strategy="pipelined_bp" runs, at sizes at which its figures mean nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import pipelined_bp_quality as quality
from benchmarks.pipelined_bp_quality import BRAKING, SGD, AdaptiveBraking, Setting, train
from lightning_eff.strategies.pipelined_bp.stack import find_stack


def rows(folder: Path) -> list[dict]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())["rows"]


@pytest.mark.parametrize(
    ("arguments", "variants"),
    [
        pytest.param(
            ["--task", "mlp", "--micro-batches", "1,32"],
            [*quality.FEW, SGD, *quality.ALL, BRAKING],
            marks=pytest.mark.long,
        ),
        pytest.param(
            ["--task", "resnet", "--micro-batches", "4", "--variants", f"lwp+sc,{BRAKING}"],
            ["lwp+sc", BRAKING],
            marks=pytest.mark.long,
        ),
        (["--task", "mlp", "--micro-batches", "8", "--variants", "stash", "--lr", "0.01,0.1"], ["stash", SGD, "stash"]),
    ],
)
def test_quality(tmp_path: Path, arguments: list[str], variants: list[str]) -> None:
    assert quality.main(["--tiny", "--seeds", "2", "--check", "--results", str(tmp_path), *arguments]) == 0
    found = rows(tmp_path)
    assert [row["pair"] for row in found] == [f"{variant} / sgd" for variant in (SGD, *variants)]
    assert all(run["finite"] for row in found for run in row["details"]["runs"])
    assert all(len(row["details"]["runs"]) == 2 for row in found)
    assert all(row["value"]["median"] == 0 for row in found if row["pair"] == "sgd / sgd")


@pytest.mark.parametrize(("task", "stages"), [("mlp", 16), ("resnet", 12)])
def test_every_layer_is_a_stage(task: str, stages: int) -> None:
    setting = Setting(task, lr=0.01, micro_batch=1, epochs=1)
    assert len(find_stack(setting.build(), stages=2)) == stages
    lr, momentum = setting.hyperparameters
    assert setting.delay == 2 * (stages - 1)
    assert (lr, momentum) == (pytest.approx(0.01 * 10 * (1 - momentum) / 32), pytest.approx(0.9 ** (1 / 32)))


def test_limits_are_those_of_the_first_stage() -> None:
    setting = Setting("mlp", lr=0.01, micro_batch=32, epochs=1)
    over = {variant: setting.over_limit(variant, 2.0) for variant in (SGD, *quality.ALL, BRAKING)}
    assert over[SGD] == pytest.approx(0.01 * 2.0 / (2 * 1.9)), "momentum without delay"
    assert over["none"] == over["stash"] > over["sc"] > 10 * over[SGD]
    assert over["spectrain"] is over[BRAKING] is None, "the analysis has neither"
    assert setting.over_limit("none", None) is None


def test_variants_start_from_the_same_and_differ() -> None:
    setting = Setting("mlp", lr=0.01, micro_batch=32, epochs=1, tiny=True)
    losses = {variant: train(setting, variant, seed=0).train_loss for variant in (SGD, "none", "sc", "lwp", BRAKING)}
    # Four stages and three micro-batches: nothing but the last stages has a velocity by the time it matters.
    assert max(losses.values()) - min(losses.values()) < 0.5
    assert losses == {variant: train(setting, variant, seed=0).train_loss for variant in losses}
    assert len({losses[SGD], losses["none"], losses["sc"], losses[BRAKING]}) == 4


def test_a_run_that_diverges_is_noted(tmp_path: Path) -> None:
    arguments = ["--tiny", "--seeds", "1", "--task", "mlp", "--micro-batches", "32", "--variants", "none"]
    assert quality.main([*arguments, "--lr", "1e30", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    (note,) = json.loads(file.read_text())["notes"]
    assert "1 of 1 runs ended at a gradient that was not finite" in note


def _braked(grad: Tensor, velocity: Tensor) -> Tensor:
    """The velocity of adaptive braking after one more gradient."""
    weight = torch.nn.Parameter(torch.zeros_like(grad))
    optimizer = AdaptiveBraking([weight], lr=1.0, momentum=0.5)
    optimizer.state[weight]["momentum_buffer"] = velocity.clone()
    weight.grad = grad.clone()
    optimizer.step()
    return optimizer.state[weight]["momentum_buffer"]


def test_braking_scales_gradients_by_filter() -> None:
    grad = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    velocity = torch.tensor([[6.0, 8.0], [-0.3, -0.4], [-4.0, 3.0], [0.0, 0.0]])
    alphas = torch.tensor([[0.0], [2.0], [1.0], [1.0]])  # agreement, opposition, neither, no velocity
    torch.testing.assert_close(_braked(grad, velocity), velocity / 2 + alphas * grad)
    torch.testing.assert_close(_braked(grad[0], velocity[0]), velocity[0] / 2)


def test_braking_with_rho_zero_is_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptiveBraking, "rho", 0.0)
    torch.manual_seed(0)
    ours = torch.nn.Linear(5, 3)
    theirs = copy.deepcopy(ours)
    optimizers = [kind(net.parameters(), lr=0.1, momentum=0.9) for kind, net in
                  ((AdaptiveBraking, ours), (torch.optim.SGD, theirs))]  # fmt: skip
    for x in torch.randn(6, 4, 5):
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_braking_follows_the_golden_trajectory() -> None:
    """w^2 / 2 from w = 1 with gradients two updates late: the card's figures, for rho = 1/2."""
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = AdaptiveBraking([weight], lr=0.1, momentum=0.9)
    optimizer.rho = 0.5
    seen = [1.0, 1.0, 1.0]
    for _ in range(8):
        weight.grad = torch.tensor(seen[-3], dtype=torch.float64)
        optimizer.step()
        seen.append(weight.item())
    expected = [0.9, 0.76, 0.584, 0.3806, 0.15954, -0.068614, -0.2929826, -0.50289134]
    assert seen[3:] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "lpw"], "unknown variants"),
        (["--task", "gpt"], "unknown tasks"),
        (["--micro-batches", "3"], "unknown micro-batches"),
        (["--device", "cuda"], "cpu only"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(arguments)
    assert message in capsys.readouterr().err
