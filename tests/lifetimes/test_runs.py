"""Nothing outlives its run, nothing is cached that can change: every method through every order of runs.

A row of the table is something people do with a Trainer; it is tried with every method it concerns. See docs/state.md.
"""

from __future__ import annotations

import functools
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import Tuner

from lightning_eff.precision import FP8Precision, LUQPrecision
from tests.lifetimes.subjects import (
    At,
    Net,
    Stop,
    Subject,
    every_subject,
    fit,
    outcome,
    same,
    trainer,
)


def other_run(subject: Subject, instance: Any) -> None:
    """A run unlike the next: other model, Trainer, seed and size of all tensors."""
    fit(trainer(**subject.given(instance), max_epochs=2), Net(seed=7, scale=50.0), seed=11)


def new_run(subject: Subject, instance: Any, **options: Any) -> Any:
    model = Net()
    fit(trainer(**subject.given(instance), **options), model)
    return outcome(model, instance)


FRESH: dict[str, Any] = {}


def fresh_run(subject: Subject) -> Any:
    """The run of a new instance, once for all tests."""
    if subject.name not in FRESH:
        FRESH[subject.name] = new_run(subject, subject.make())
    return FRESH[subject.name]


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


Row = Callable[[Subject, Any, Path], Any]


@pytest.mark.parametrize("row", [another_trainer, a_broken_run, an_evaluation_of_another_model, a_pickle])
@every_subject()
def test_a_new_run_is_as_with_a_new_instance(subject: Subject, row: Row, tmp_path: Path) -> None:
    used = subject.make()
    used = row(subject, used, tmp_path) or used
    assert same(new_run(subject, used), fresh_run(subject))


@every_subject(few=True)
def test_a_new_run_after_an_interrupt_is_as_with_a_new_instance(subject: Subject, tmp_path: Path) -> None:
    used = subject.make()
    an_interrupted_run(subject, used, tmp_path)
    assert same(new_run(subject, used), fresh_run(subject))


@every_subject()
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


@every_subject()
def test_search_then_fit(subject: Subject, tmp_path: Path) -> None:
    instance, model = subject.make(), Net()
    runner = trainer(**subject.given(instance), default_root_dir=tmp_path)
    torch.manual_seed(5)
    Tuner(runner).lr_find(model, num_training=3, min_lr=1e-3, max_lr=1e-2, update_attr=False)
    fit(runner, model)
    assert same(outcome(model, instance), fresh_run(subject))


@every_subject(few=True)
@pytest.mark.parametrize("in_the_fit", [pytest.param(False, marks=pytest.mark.long), True])
def test_search_of_a_batch_size_then_fit(subject: Subject, in_the_fit: bool, tmp_path: Path) -> None:
    """Lightning's finder takes all callbacks away, trains, and puts back a checkpoint."""
    search = {"steps_per_trial": 2, "max_trials": 1, "init_val": 8}
    instance, model = subject.make(), Net()
    options = subject.given(instance)
    if in_the_fit:
        options["callbacks"] = [*options.get("callbacks", []), BatchSizeFinder(**search)]
    runner = trainer(**options, default_root_dir=tmp_path)
    if not in_the_fit:
        torch.manual_seed(5)
        Tuner(runner).scale_batch_size(model, **search)
    fit(runner, model)
    assert model.batch_size == 8
    assert same(outcome(model, instance), fresh_run(subject))


@every_subject(few=True)
def test_a_thread_is_like_the_main_thread(subject: Subject) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(new_run(subject, subject.make())))
    thread.start()
    thread.join()
    assert same(found[0], fresh_run(subject))


def test_two_fits_in_threads_do_not_hear_of_each_others_steps() -> None:
    makes = [functools.partial(LUQPrecision, hindsight=0.5), functools.partial(FP8Precision, scaling="delayed")]
    runs = [(trainer(plugins=[make()], max_epochs=4), Net()) for make in makes]
    threads = [threading.Thread(target=fit, args=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for make, (runner, model) in zip(makes, runs, strict=True):
        alone, instance = Net(), make()
        fit(trainer(plugins=[instance], max_epochs=4), alone)
        assert same(outcome(model, runner.precision_plugin), outcome(alone, instance))


# ------------------------------------------------------------------------------------------ a run that goes on


def longer(subject: Subject) -> bool:
    return subject.of != "LUQFineTuning"  # its phase moves: tests/callbacks


def whole_run(subject: Subject) -> Any:
    return new_run(subject, subject.make(), max_epochs=2)


@every_subject(longer)
def test_a_fit_that_goes_on_is_the_uninterrupted_one(subject: Subject) -> None:
    """With an optimizer that keeps no state, because Lightning makes new ones."""
    instance, model = subject.make(), Net()
    runner = trainer(**subject.given(instance))
    fit(runner, model)
    runner.fit_loop.max_epochs = 2
    fit(runner, model, seed=9)
    assert same(outcome(model, instance), whole_run(subject))


@every_subject(longer)
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


@every_subject()
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


@every_subject()
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


@every_subject()
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
