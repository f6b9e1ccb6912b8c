"""Nothing outlives its run, nothing is cached that can change: every method through every order of runs.

A row of the table is something people do with a Trainer; it is tried with every method it concerns. See docs/state.md.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import lightning_eff.precision
from lightning_eff.errors import NonFiniteGradientError, UnsupportedCombinationError
from lightning_eff.optim.bf16 import ShadowedOptimizer
from lightning_eff.optim.steps import STEPS
from lightning_eff.precision import config
from tests.lifetimes import PRECISIONS, SUBJECTS, At, Manual, Net, Stop, Subject, fit, outcome, same, trainer


@pytest.fixture(autouse=True)
def _small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SLOW_FEATURES", 0)


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Iterator[None]:
    yield
    assert not any(STEPS._live())
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


def with_folder(runner: Trainer, folder: Path) -> Trainer:
    runner._default_root_dir = str(folder)
    return runner


def other_run(subject: Subject, instance: Any) -> None:
    """A run unlike the next: other model, Trainer, seed and size of all tensors."""
    fit(trainer(**subject.given(instance), max_epochs=2), Net(seed=7, scale=50.0), seed=11)


def new_run(subject: Subject, instance: Any, **options: Any) -> Any:
    model = Net()
    fit(trainer(**subject.given(instance), **options), model)
    return outcome(model, instance)


# -------------------------------------------------------------------------- a new run is as with a new instance


def another_trainer(subject: Subject, used: Any, folder: Path) -> Any:
    """Folds of a cross-validation."""
    other_run(subject, used)


def a_broken_run(subject: Subject, used: Any, folder: Path) -> Any:
    """An exception in the middle of the first run."""

    def stop(*_: Any) -> None:
        raise Stop

    options = subject.given(used)
    runner = trainer(**{**options, "callbacks": [*options.get("callbacks", []), At(stop)]})
    with pytest.raises(Stop):
        fit(runner, Net(seed=7, scale=50.0))


def an_interrupted_run(subject: Subject, used: Any, folder: Path) -> Any:
    """Control-C in the middle of a step."""

    class Interrupted(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                raise KeyboardInterrupt
            return loss

    with pytest.raises(SystemExit):
        fit(trainer(**subject.given(used)), Interrupted(seed=7, scale=50.0))


def an_evaluation_of_another_model(subject: Subject, used: Any, folder: Path) -> Any:
    """Another Trainer validates another model, from a checkpoint of its own."""
    other_run(subject, used)
    runner, model = trainer(**subject.given(used), limit_val_batches=2), Net(seed=7, scale=50.0)
    fit(runner, model)
    runner.save_checkpoint(folder / "other.ckpt")
    runner = trainer(**subject.given(used), limit_val_batches=2)
    runner.validate(model, ckpt_path=folder / "other.ckpt", verbose=False, weights_only=True)


def a_pickle(subject: Subject, used: Any, folder: Path) -> Any:
    """Copies that tuning libraries send to their workers, made after a run and in the middle of one."""
    copies = []
    options = subject.given(used)
    watch = At(lambda *_: copies.append(pickle.loads(pickle.dumps(used))))
    runner = trainer(**{**options, "callbacks": [*options.get("callbacks", []), watch]})
    fit(runner, Net(seed=7, scale=50.0), seed=11)
    return copies[0]


BEFORE: dict[str, Callable[[Subject, Any, Path], Any]] = {
    row.__name__: row
    for row in (another_trainer, a_broken_run, an_interrupted_run, an_evaluation_of_another_model, a_pickle)
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_new_run_is_as_with_a_new_instance(subject: Subject, before: str, tmp_path: Path) -> None:
    used = subject.make()
    used = BEFORE[before](subject, used, tmp_path) or used
    assert same(new_run(subject, used), new_run(subject, subject.make()))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_another_model_with_the_same_trainer(subject: Subject) -> None:
    """The Trainer goes on counting; the method begins anew."""
    results = []
    for used_again in (True, False):
        first = subject.make()
        runner = trainer(**subject.given(first))
        fit(runner, Net(seed=7, scale=50.0), seed=11)
        second = first if used_again else subject.make()
        if not subject.is_callback:
            runner.strategy.precision_plugin = second
        elif subject.of != "LowPrecision":  # what it made of the plugin is the Trainer's
            runner.callbacks[runner.callbacks.index(first)] = second
        runner.fit_loop.max_epochs = 2
        model = Net()
        fit(runner, model)
        results.append(outcome(model, second))
    assert same(*results)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_search_then_fit(subject: Subject, tmp_path: Path) -> None:
    instance, model = subject.make(), Net()
    runner = trainer(**subject.given(instance), default_root_dir=tmp_path)
    tuner = Tuner(runner)
    torch.manual_seed(5)
    tuner.lr_find(model, num_training=3, min_lr=1e-3, max_lr=1e-2, update_attr=False)
    tuner.scale_batch_size(model, steps_per_trial=2, max_trials=1, init_val=8)
    assert model.batch_size == 8
    fit(runner, model)
    assert same(outcome(model, instance), new_run(subject, subject.make()))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_thread_is_like_the_main_thread(subject: Subject) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(new_run(subject, subject.make())))
    thread.start()
    thread.join()
    assert same(found[0], new_run(subject, subject.make()))


# ------------------------------------------------------------------------------------------ a run that goes on


def longer(subject: Subject) -> bool:
    return subject.of != "LUQFineTuning"  # its phase moves: tests/callbacks


GOES_ON = [subject for subject in SUBJECTS if longer(subject)]


def whole_run(subject: Subject) -> Any:
    return new_run(subject, subject.make(), max_epochs=2)


@pytest.mark.parametrize("subject", GOES_ON, ids=lambda subject: subject.name)
def test_a_fit_that_goes_on_is_the_uninterrupted_one(subject: Subject) -> None:
    """With an optimizer that keeps no state, because Lightning makes new ones."""
    instance, model = subject.make(), Net()
    runner = trainer(**subject.given(instance))
    fit(runner, model)
    runner.fit_loop.max_epochs = 2
    fit(runner, model, seed=9)
    assert same(outcome(model, instance), whole_run(subject))


@pytest.mark.parametrize("subject", GOES_ON, ids=lambda subject: subject.name)
def test_a_broken_fit_that_goes_on_is_the_uninterrupted_one(subject: Subject) -> None:
    class Broken(Net):
        broken = False

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1 and not self.broken:
                self.broken = True
                raise Stop

    instance, model = subject.make(), Broken()
    runner = trainer(**subject.given(instance), max_epochs=2)
    with pytest.raises(Stop):
        fit(runner, model)
    fit(runner, model, seed=9)
    assert same(outcome(model, instance), whole_run(subject))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_evaluations_leave_no_trace(subject: Subject) -> None:
    """Before, during, between and after fits."""
    results = []
    for evaluate in (False, True):
        instance, model = subject.make(), Net()
        options = dict(limit_val_batches=2, num_sanity_val_steps=1, val_check_interval=2) if evaluate else {}
        runner = trainer(**subject.given(instance), **options)

        def look(evaluate: bool = evaluate, runner: Trainer = runner, model: Net = model) -> None:
            if evaluate:
                runner.validate(model, verbose=False)
                runner.test(model, verbose=False)
                runner.predict(model)

        look()
        fit(runner, model)
        look()
        if longer(subject):
            runner.fit_loop.max_epochs = 2
            fit(runner, model)
        look()
        results.append(outcome(model, instance))
    assert same(*results)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_what_is_taken_up_is_the_checkpoints_alone(subject: Subject, tmp_path: Path) -> None:
    """A checkpoint of the method, and one of a plain run, with instances that know of another run."""
    last = {"steps": 6} if subject.of == "LUQFineTuning" else {}
    subject = Subject(subject.name, subject.of, {**subject.options, **last}, subject.precision)
    for path, options in (("own", subject.given(subject.make())), ("plain", {})):
        runner = trainer(**options, max_epochs=2)
        fit(runner, Net())
        runner.fit_loop.epoch_progress.current.completed = 1  # as if cut after the first epoch
        runner.save_checkpoint(tmp_path / f"{path}.ckpt")
        results = []
        for used in (True, False):
            instance, model = subject.make(), Net(seed=5)
            runner = trainer(**subject.given(instance), max_epochs=3)
            if used:
                runner.fit_loop.max_epochs = 1
                fit(runner, model, seed=11)
                runner.fit_loop.max_epochs = 3
            fit(runner, model, ckpt_path=tmp_path / f"{path}.ckpt", weights_only=True)
            results.append(outcome(model, instance))
        assert same(*results), path


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_checkpoint_that_is_only_evaluated_is_not_taken_up(subject: Subject, tmp_path: Path) -> None:
    runner = trainer(**subject.given(subject.make()), max_epochs=3)
    fit(runner, Net(scale=8.0))
    runner.save_checkpoint(tmp_path / "long.ckpt")
    instance, model = subject.make(), Net()
    runner = trainer(**subject.given(instance), limit_val_batches=1)
    fit(runner, model)
    kept = outcome(model, instance)[1]
    runner.validate(model, ckpt_path=tmp_path / "long.ckpt", verbose=False, weights_only=True)
    found = outcome(model, instance)[1]
    scales = {"memory", "weights"}  # they are of the weights, which were loaded
    assert repr({k: v for k, v in found.items() if k not in scales}) == repr(
        {k: v for k, v in kept.items() if k not in scales}
    )


# ------------------------------------------------------------------------------------------ optimizers


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_raw_optimizers_are_seen_like_lightnings(subject: Subject, optimizers: int) -> None:
    results = []
    for raw in (False, True):
        instance, model = subject.make(), Manual(raw, optimizers)
        fit(trainer(**subject.given(instance), max_epochs=2), model)
        results.append(outcome(model, instance))
    assert same(*results)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_optimizers_made_anew_during_the_run_are_seen(subject: Subject) -> None:
    """``setup_optimizers`` again, before the second epoch; they are used raw, so nobody tells of them."""

    class Anew(Manual):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    results = []
    for raw in (False, True):
        instance, model = subject.make(), Anew(raw)
        fit(trainer(**subject.given(instance), max_epochs=2), model)
        results.append(outcome(model, instance))
        optimizer = model.trainer.optimizers[0]
        assert isinstance(optimizer, ShadowedOptimizer) == subject.in_bfloat16
    assert same(*results)


class Grows(Net):
    """A backbone that is thawed while the run goes on; its parameters become a group of the optimizer then."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([self.backbone(batch[0]), batch[1]], batch_idx)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=0.05)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_parameter_group_added_later_is_trained(subject: Subject, tmp_path: Path) -> None:
    options = subject.given(subject.make())
    options["callbacks"] = [BackboneFinetuning(1, verbose=False), *options.get("callbacks", [])]
    model = Grows()
    before = model.backbone[0].weight.detach().clone()
    runner = trainer(**options, max_epochs=3)
    fit(runner, model)
    assert len(runner.optimizers[0].param_groups) == 2
    assert not torch.equal(model.backbone[0].weight.float(), before)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    runner.save_checkpoint(tmp_path / "grown.ckpt")


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_closures_evaluated_several_times(subject: Subject) -> None:
    """LBFGS, through Lightning and raw: alike, or refused before anything has changed."""

    class Several(Net):
        def __init__(self, raw: bool) -> None:
            super().__init__()
            self.automatic_optimization, self.raw = not raw, raw

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not self.raw:
                return self.loss(batch)

            def closure() -> Any:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.step(closure)
            return None

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    results = []
    for raw in (False, True):
        instance, model = subject.make(), Several(raw)
        before = outcome(model)
        runner = trainer(**subject.given(instance))
        if subject.in_bfloat16:
            with pytest.raises(UnsupportedCombinationError, match="LBFGS evaluates its closure several times"):
                fit(runner, model)
            assert all(torch.equal(p.bfloat16(), q) for p, q in zip(before[0], outcome(model)[0], strict=True))
            continue
        fit(runner, model)
        results.append(outcome(model, instance))
    assert not results or same(*results)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("subject", [s for s in PRECISIONS if not s.in_bfloat16], ids=lambda subject: subject.name)
def test_the_guard_looks_at_raw_steps(subject: Subject, with_closure: bool) -> None:
    class Poisoned(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)

            def closure() -> Any:
                optimizer.zero_grad()
                loss = self.loss(batch) * (torch.nan if batch_idx == 2 else 1.0)
                self.manual_backward(loss)
                return loss

            if batch_idx == 2:
                self.before = outcome(self)
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()

    model = Poisoned(raw=True)
    with pytest.raises(NonFiniteGradientError, match="at optimizer step 2"):
        fit(trainer(**subject.given(subject.make())), model)
    assert same(model.before, outcome(model))


@pytest.mark.parametrize("subject", [s for s in PRECISIONS if s.in_bfloat16], ids=lambda subject: subject.name)
def test_an_optimizer_nobody_knows_of_is_refused_where_it_would_lose_updates(subject: Subject) -> None:
    class Hidden(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.before = outcome(self)
            self.manual_backward(self.loss(batch))
            torch.optim.Adam(self.parameters()).step()

    model = Hidden(raw=True)
    with pytest.raises(UnsupportedCombinationError, match=r"Adam that is not one of the Trainer's.*bf16_updates"):
        fit(trainer(**subject.given(subject.make())), model)
    assert same(model.before, outcome(model))


def test_a_callback_that_searches_in_the_fit_itself(tmp_path: Path) -> None:
    """Lightning's finders take all callbacks away, train, and put back a checkpoint."""
    for subject in SUBJECTS:
        instance, model = subject.make(), Net()
        options = subject.given(instance)
        finder = BatchSizeFinder(steps_per_trial=2, max_trials=1, init_val=8)
        options["callbacks"] = [*options.get("callbacks", []), finder]
        fit(trainer(**options, default_root_dir=tmp_path), model)
        assert same(outcome(model, instance), new_run(subject, subject.make())), subject.name


def test_two_models_with_equal_names_in_one_fabric() -> None:
    """Each learns its own scales."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="fp8-delayed")
    nets = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    models = [fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01)) for net in nets]
    for size, (model, optimizer) in zip((1.0, 100.0), models, strict=True):
        fabric.backward(model(torch.ones(2, 4) * size).sum())
        optimizer.step()
    plugin = fabric._precision
    memories = [state.memories["input"].estimate.max_abs for state in plugin.states().values()]
    assert len(memories) == 2
    assert memories[1] > 10 * memories[0] > 0
    STEPS.remove(plugin)


def test_fabric_looks_when_the_closure_has_made_the_gradients() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="luq4")
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    before = outcome(net)

    def closure() -> Any:
        loss = model(torch.ones(2, 4)).sum() * torch.nan
        fabric.backward(loss)
        return loss

    for step in (optimizer.step, optimizer.optimizer.step):
        with pytest.raises(NonFiniteGradientError):
            step(closure)
    assert same(before, outcome(net))
    STEPS.remove(fabric._precision)


def test_figures_are_sampled_with_raw_optimizers() -> None:
    for raw in (False, True):
        instance = lightning_eff.precision.LUQPrecision(measure_every_n_steps=2)
        fit(trainer(plugins=[instance]), Manual(raw))
        assert set(instance.metrics) == set(instance.info.metrics)
