"""Nothing that is NaN or Inf reaches a parameter; what is finite is left as it is, to the bit."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff import DropComputeStrategy, LUQPrecision, NonFiniteGuard, PipelinedBPStrategy
from lightning_eff.errors import (
    CheckpointError,
    ConfigurationError,
    EffWarning,
    NoEffectWarning,
    NonFiniteGradientError,
    UnsupportedCombinationError,
)
from tests.harness import run_ranks

STEPS = 8


class Model(LightningModule):
    """In the batches ``bad`` all is NaN (``loss``), one gradient Inf (``weight``), or the loss alone (``constant``)."""

    def __init__(self, *, bad: tuple[int, ...] = (), what: str = "loss", adam: bool = False, manual: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.bad, self.what, self.adam, self.manual = bad, what, adam, manual
        self.automatic_optimization = not manual
        self.before: list[Tensor] = []
        self.bad_ranks: tuple[int, ...] = (0, 1)

    def loss(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.net(batch[0]).square().mean()
        self.before = [p.detach().clone() for p in self.parameters()]
        if batch_idx not in self.bad or self.global_rank not in self.bad_ranks:
            return loss
        if self.what == "weight":
            return loss + _inf_gradient(self.net[2].weight)
        return loss * math.nan if self.what == "loss" else loss + torch.tensor(math.inf)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if not self.manual:
            return self.loss(batch, batch_idx)
        optimizer: Any = self.optimizers(use_pl_optimizer=self.manual == "lightning")
        if self.manual == "closure":
            optimizer.step(lambda: self._backward(optimizer, batch, batch_idx))
        else:
            self._backward(optimizer, batch, batch_idx)
            optimizer.step()
        return None

    def _backward(self, optimizer: Any, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer.zero_grad()
        loss = self.loss(batch, batch_idx)
        self.manual_backward(loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters()) if self.adam else torch.optim.SGD(self.parameters(), 0.1, 0.5)


def _inf_gradient(weight: Tensor) -> Tensor:
    """Zero, with an infinite gradient."""
    return (weight - weight.detach()).sum().sqrt()


def data(*, without: tuple[int, ...] = ()) -> DataLoader[Any]:
    x = torch.randn(STEPS, 4, 4, generator=torch.Generator().manual_seed(1))
    kept = [i for i in range(STEPS) if i not in without]
    return DataLoader(TensorDataset(x[kept].flatten(0, 1)), batch_size=4)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    small = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 1}
    return Trainer(callbacks=list(callbacks), **{**quiet, **small, **options})


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------- what is finite


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("answer", ["raise", "warn", "skip"])
@pytest.mark.parametrize("manual", ["", "raw"])
def test_it_is_neutral(answer: Any, adam: bool, manual: str) -> None:
    found = []
    for guards in ([], [NonFiniteGuard(on_nonfinite=answer)]):
        model = Model(adam=adam, manual=manual)
        torch.manual_seed(3)
        runner = trainer(*guards, gradient_clip_val=None if manual else 0.01)
        runner.fit(model, data())
        found.append([*weights(model), torch.get_rng_state()])
    assert equal(*found)


def test_large_gradients_that_are_finite_pass() -> None:
    """The sum of their elements is not finite, each element is."""
    guard, model = NonFiniteGuard(), Model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3e38)
    runner = trainer(guard)
    runner.strategy.connect(model)
    guard._look(runner, torch.optim.SGD(model.parameters(), 0.1))
    assert guard.state_dict() == {"skipped": 0, "in_a_row": 0}


# ---------------------------------------------------------------------------------------------------------- what is not


@pytest.mark.parametrize("manual", ["", "raw", "closure", "lightning"])
def test_the_run_ends_before_a_parameter_is_changed(manual: str) -> None:
    model = Model(bad=(3,), manual=manual)
    with pytest.raises(
        NonFiniteGradientError, match=r"at optimizer step 3 \(rank 0\).* in 4 of 4 parameters: net\.0"
    ) as e:
        trainer(NonFiniteGuard()).fit(model, data())
    assert "the loss of rank 0" in str(e.value)
    assert "on_nonfinite='skip'" in str(e.value)
    assert equal(weights(model), model.before)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_parameter_is_named_before_clipping_spreads_it() -> None:
    model = Model(bad=(2,), what="weight")
    with pytest.raises(NonFiniteGradientError, match=r"in 1 of 4 parameters: net\.2\.weight\."):
        trainer(NonFiniteGuard(), gradient_clip_val=1.0).fit(model, data())
    assert equal(weights(model), model.before)


@pytest.mark.parametrize("answer", ["raise", "warn"])
def test_a_loss_without_a_gradient_is_seen(answer: Any) -> None:
    model, runner = Model(bad=(1,), what="constant"), trainer(NonFiniteGuard(on_nonfinite=answer))
    if answer == "raise":
        with pytest.raises(NonFiniteGradientError, match="the loss of rank 0 is NaN or Inf .* though no gradient is"):
            runner.fit(model, data())
        assert equal(weights(model), model.before)
    else:
        with pytest.warns(EffWarning, match="no gradient is. The optimizer step goes on"):
            runner.fit(model, data())


def test_a_warning_changes_nothing() -> None:
    model = Model(bad=(1, 2))
    with pytest.warns(EffWarning, match="goes on as asked"):
        trainer(NonFiniteGuard(on_nonfinite="warn")).fit(model, data())
    assert all(bool(p.isnan().all()) for p in model.parameters())


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("manual", ["", "raw", "lightning"])
@pytest.mark.parametrize("what", ["loss", "constant", "weight"])
def test_a_skipped_run_is_the_run_without_that_batch(adam: bool, manual: str, what: str) -> None:
    guard, skipping = NonFiniteGuard(on_nonfinite="skip"), Model(bad=(2, 5), what=what, adam=adam, manual=manual)
    runner = trainer(guard)
    with pytest.warns(EffWarning, match=r"The step is skipped, [12] so far"):
        runner.fit(skipping, data())
    model = Model(adam=adam, manual=manual)
    trainer().fit(model, data(without=(2, 5)))
    assert equal(weights(skipping), weights(model))
    assert guard.state_dict() == {"skipped": 2, "in_a_row": 0}
    assert runner.callback_metrics["eff/non_finite_guard/skipped"] == 2


def test_one_bad_micro_batch_skips_the_step() -> None:
    guard, model = NonFiniteGuard(on_nonfinite="skip"), Model(bad=(2,))
    runner = trainer(guard, accumulate_grad_batches=2)
    with pytest.warns(EffWarning, match="at optimizer step 1 "):
        runner.fit(model, data())
    other = Model()
    trainer(accumulate_grad_batches=2).fit(other, data(without=(2, 3)))
    assert equal(weights(model), weights(other))
    assert runner.global_step == STEPS / 2


def test_training_that_stands_still_ends() -> None:
    guard = NonFiniteGuard(on_nonfinite="skip", max_skipped_steps=3)
    told = pytest.raises(NonFiniteGradientError, match="after max_skipped_steps=3 skipped steps in a row")
    with told, pytest.warns(EffWarning, match="skipped"):
        trainer(guard).fit(Model(bad=(1, 2, 3, 4, 5)), data())
    assert guard.state_dict() == {"skipped": 3, "in_a_row": 3}


def test_steps_in_a_row_are_counted_anew_after_a_good_one() -> None:
    guard = NonFiniteGuard(on_nonfinite="skip", max_skipped_steps=2)
    with pytest.warns(EffWarning, match="skipped"):
        trainer(guard).fit(Model(bad=(0, 1, 3, 4, 6, 7)), data())
    assert guard.state_dict() == {"skipped": 6, "in_a_row": 2}


# ------------------------------------------------------------------------------------------------------------ state


@pytest.mark.filterwarnings("ignore:non_finite_guard:lightning_eff.errors.EffWarning")
def test_a_resumed_run_goes_on_to_count(tmp_path: Path) -> None:
    def run(epochs: int, *, most: int = 2, **options: Any) -> tuple[NonFiniteGuard, Model]:
        guard, model = NonFiniteGuard(on_nonfinite="skip", max_skipped_steps=most), Model(bad=(0, 3), adam=True)
        runner = trainer(guard, max_epochs=epochs)
        runner.fit(model, data(without=(4, 5, 6, 7)), **options)
        runner.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return guard, model

    run(1)
    saved = {"ckpt_path": str(tmp_path / "1.ckpt"), "weights_only": True}
    assert torch.load(saved["ckpt_path"], weights_only=True)["callbacks"]["NonFiniteGuard"] == {
        "skipped": 2,
        "in_a_row": 1,
    }
    whole, wanted = run(2)
    guard, model = run(2, **saved)
    assert guard.state_dict() == whole.state_dict() == {"skipped": 4, "in_a_row": 1}
    assert equal(weights(model), weights(wanted))
    with pytest.raises(NonFiniteGradientError, match="in a row"):
        run(2, most=1, **saved)


def test_a_new_run_begins_at_zero() -> None:
    guard = NonFiniteGuard(on_nonfinite="skip")
    with pytest.warns(EffWarning, match="skipped"):
        trainer(guard).fit(Model(bad=(7,)), data())
    trainer(guard).fit(Model(), data())
    assert guard.state_dict() == {"skipped": 0, "in_a_row": 0}


@pytest.mark.parametrize("state", [{}, {"skipped": 1}, {"skipped": -1, "in_a_row": 0}, {"skipped": 1, "in_a_row": 2}])
def test_a_damaged_state_is_refused(state: dict[str, int]) -> None:
    guard = NonFiniteGuard()
    with pytest.raises(CheckpointError, match=r"del checkpoint\['callbacks'\]\['NonFiniteGuard'\]"):
        guard.load_state_dict(state)
    assert guard.state_dict() == {"skipped": 0, "in_a_row": 0}


# ----------------------------------------------------------------------------------------------------- combinations


def test_it_stands_aside_for_a_loss_scaler() -> None:
    guard, model = NonFiniteGuard(), Model(bad=(0,))
    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    with pytest.warns(NoEffectWarning, match="stands aside: the loss scaler of precision='16-mixed'"):
        trainer(guard, plugins=[scaled]).fit(model, data())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    "precision",
    ["bf16-mixed", "bf16-true", "bf16-sr", LUQPrecision(exempt_first_last=False)],
    ids=lambda p: str(getattr(p, "eff_method", p)),
)
def test_other_precisions(precision: Any) -> None:
    given = {"precision" if isinstance(precision, str) else "plugins": precision}
    model = Model(bad=(2,))
    model.loss = lambda batch, i, loss=model.loss: loss([batch[0].to(model.dtype)], i)  # type: ignore[method-assign]
    with pytest.raises(NonFiniteGradientError, match="optimizer step 2"):
        trainer(NonFiniteGuard(), **given).fit(model, data())
    assert equal(weights(model), model.before)


@pytest.mark.parametrize("made", [DropComputeStrategy, PipelinedBPStrategy])
def test_strategies_with_a_guard_of_their_own_are_refused(made: Any) -> None:
    runner = trainer(strategy=made(process_group_backend="gloo"))
    with pytest.raises(
        UnsupportedCombinationError, match=f"NonFiniteGuard cannot be combined with {made.__name__}: .*itself"
    ):
        NonFiniteGuard().on_fit_start(runner, Model())


def test_strategies_that_keep_parts_of_gradients_are_refused() -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    runner = trainer()
    runner.strategy.__class__ = type("Mine", (ModelParallelStrategy,), dict(vars(type(runner.strategy))))
    with pytest.raises(UnsupportedCombinationError, match="non_finite_guard"):
        NonFiniteGuard().on_fit_start(runner, Model())


@pytest.mark.parametrize("options", [{"on_nonfinite": "stop"}, {"max_skipped_steps": 0}])
def test_a_wrong_option_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        NonFiniteGuard(**options)


def test_the_other_package_has_it_too() -> None:
    other, face = pytest.importorskip("pytorch_lightning"), importlib.import_module("lightning_eff.pytorch_lightning")
    assert issubclass(face.NonFiniteGuard, other.Callback)
    assert face.NonFiniteGuard(on_nonfinite="skip").on_nonfinite == "skip"


def _on_one_rank(rank: int, world: int, answer: str, what: str) -> tuple[str, list[Tensor], dict[str, int]]:
    torch.set_num_threads(1)
    model, guard, told = Model(bad=(2,), what=what), NonFiniteGuard(on_nonfinite=answer), ""  # type: ignore[arg-type]
    model.bad_ranks = (1,)
    try:
        trainer(guard, devices=world, strategy="ddp").fit(model, data())
    except NonFiniteGradientError as error:
        told = str(error)
        assert equal(weights(model), model.before)
    return told, weights(model), guard.state_dict()


@pytest.mark.filterwarnings("ignore::lightning_eff.errors.EffWarning")
@pytest.mark.parametrize("what", ["loss", "constant"])
@pytest.mark.parametrize("answer", ["raise", "skip"])
def test_two_ranks_decide_alike(answer: str, what: str) -> None:
    (told, first, state), (other, second, again) = run_ranks(_on_one_rank, 2, answer, what)
    assert equal(first, second)
    assert state == again
    assert all(bool(p.isfinite().all()) for p in first)
    if answer == "raise":
        assert "the loss of rank 1" in told
        assert told.replace("(rank 0)", "(rank 1)") == other
    else:
        assert state == {"skipped": 1, "in_a_row": 0}


def test_the_count_is_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    with pytest.warns(EffWarning, match="skipped"):
        trainer(NonFiniteGuard(on_nonfinite="skip"), logger=logger).fit(Model(bad=(3,)), data())
    logger.save()
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("eff/non_finite_guard/skipped")
    assert [float(line.split(",")[column]) for line in lines[1:]] == [0, 0, 0, 1, 1, 1, 1, 1]
