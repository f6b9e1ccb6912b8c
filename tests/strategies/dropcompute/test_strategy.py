"""strategy="dropcompute" on real gloo ranks: exact sums, Lightning around it, thresholds, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.errors import ConfigurationError, NoEffectWarning, UnsupportedCombinationError
from lightning_eff.functional.stragglers.timings import read_timings
from lightning_eff.methods import METHODS
from tests.harness import run_ranks
from tests.strategies.dropcompute.plans import PLAN, SAMPLES, STEPS, M, planned, reference
from tests.strategies.models import BATCH, NAMESPACES, loader, loss_of, parameters_of, task, trainer


def _fit(rank: int, world: int, kind: str, options: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_eff.strategies import DropComputeStrategy

    steps: list[Tensor] = []
    model = task(on_before_zero_grad=lambda self, _: steps.append(parameters_of(self.net)))
    plan = options.pop("plan", PLAN)
    if kind == "ddp":
        strategy, model.unused = DDPStrategy(process_group_backend="gloo"), nn.Identity()
    elif kind == "planned":
        strategy = planned(plan, **options)
    else:
        strategy = DropComputeStrategy(process_group_backend="gloo", **options)
    samples = trained.pop("samples", SAMPLES)
    runner = trainer(strategy, **{"accumulate_grad_batches": M, **trained})
    runner.fit(model, loader(rank, world, samples))
    return {
        "weights": parameters_of(model.net),
        "steps": steps,
        "global_step": runner.global_step,
        "computed": model.computed,
        "loss": float(runner.callback_metrics["loss"]),
        "lr": runner.optimizers[0].param_groups[0]["lr"],
        "unused": model.unused.weight.grad is None if kind != "ddp" else True,
        "metrics": getattr(strategy, "metrics", {}),
        "threshold_s": getattr(strategy, "threshold_s", None),
        "max_steps": runner.max_steps,
    }


def fit(kind: str, options: dict[str, Any] | None = None, **trained: Any) -> list[dict[str, Any]]:
    results = run_ranks(_fit, 2, kind, options or {}, trained, init_group=False)
    assert torch.equal(results[0]["weights"], results[1]["weights"]), "replicas differ"
    for first, second in zip(results[0]["steps"], results[1]["steps"], strict=True):
        assert torch.equal(first, second)
    return results


@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES + 2 * BATCH * 3])
def test_without_dropping_it_is_ddp_to_the_last_bit(samples: int) -> None:
    """Also in the short last step of an epoch, over two epochs, with clipping."""
    options = {"max_epochs": 2, "gradient_clip_val": 0.5, "samples": samples}
    ours, theirs = fit("time", {"threshold": math.inf}, **options), fit("ddp", **options)
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("weights", "global_step", "loss", "lr"):
            assert mine[key] == other[key] if key != "weights" else torch.equal(mine[key], other[key])
        assert mine["unused"]


@pytest.mark.parametrize("normalize", ["computed", "maximum"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_any_pattern_is_the_weighted_mean(normalize: str, clip: float | None) -> None:
    results = fit("planned", {"normalize": normalize}, gradient_clip_val=clip)
    expected = reference(PLAN, normalize=normalize, clip=clip)
    for rank, result in enumerate(results):
        assert result["global_step"] == STEPS
        assert len(result["computed"]) == sum(PLAN[rank])
        assert result["lr"] == pytest.approx(0.2 * 0.95**STEPS)
        assert result["unused"]
        assert (result["weights"] - expected).norm() <= 2e-6 * expected.norm()


def test_in_float64_it_is_the_weighted_mean_to_twelve_digits() -> None:
    results = fit("planned", precision="64-true")
    expected = reference(PLAN)
    assert (results[0]["weights"] - expected).norm() <= 1e-12 * expected.norm()


def test_a_short_last_step_is_weighted_rightly() -> None:
    samples = SAMPLES + 2 * BATCH * 3
    plan = [[*PLAN[0], 1], [*PLAN[1], 3]]
    results = fit("planned", {"plan": plan}, samples=samples)
    expected = reference(plan, samples=samples)
    assert (results[0]["weights"] - expected).norm() <= 2e-6 * expected.norm()


def test_who_is_slow_does_not_matter() -> None:
    """Permuting the ranks' counts and data with them leaves the mean over the same micro-batches."""
    plan = [[1] * STEPS, [3] * STEPS]
    assert reference(plan).norm() > 0
    results = fit("planned", {"plan": plan})
    assert (results[0]["weights"] - reference(plan)).norm() <= 2e-6 * reference(plan).norm()
    assert not torch.allclose(results[0]["weights"], reference([plan[1], plan[0]]), rtol=1e-4)


def test_at_least_one_micro_batch_is_computed() -> None:
    for least in (1, 2):
        results = fit("time", {"threshold": 0.0, "min_micro_batches": least})
        assert all(len(result["computed"]) == least * STEPS for result in results)
        plan = [[least] * STEPS] * 2
        assert (results[0]["weights"] - reference(plan)).norm() <= 2e-6 * reference(plan).norm()


@pytest.mark.parametrize("precision", ["bf16-mixed", "luq4", "fp8"])
def test_precisions_compose(precision: str) -> None:
    results = fit("planned", precision=precision)
    assert results[0]["weights"].isfinite().all()
    assert results[0]["global_step"] == STEPS


def warm_up() -> None:
    """The first micro-batch of a process imports much; no delay is to be many times that."""
    fit("time", {"threshold": math.inf}, samples=2 * BATCH * M)


@pytest.mark.alone
def test_stragglers_drop_and_the_others_do_not() -> None:
    """The threshold is many times what a step takes, and less than what a micro-batch of the slow rank does."""
    warm_up()
    delay = "slow:rank=1,factor=100"
    results = fit("time", {"threshold": 0.02, "delay": delay}, log_every_n_steps=2)
    assert len(results[1]["computed"]) < len(results[0]["computed"])
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=0.5)
    assert set(results[0]["metrics"]) == set(METHODS["dropcompute"].metrics)
    assert 0 < results[0]["metrics"]["eff/dropcompute/drop_rate"] < 1
    assert results[0]["metrics"]["eff/dropcompute/speedup_estimate"] > 1


@pytest.mark.alone
def test_the_threshold_is_measured_and_agreed_on(tmp_path: Path) -> None:
    """Rank 1 stalls in every step; what is measured is what the model of section 3 makes of it."""
    path = tmp_path / "run.csv"
    options = {
        "threshold": "auto",
        "warmup_steps": 10,
        "max_drop_rate": 0.5,
        "delay": "slow:rank=1,factor=30",
        "record_timings": str(path),
    }
    warm_up()
    results = fit("time", options, samples=2 * BATCH * M * 16)
    assert results[0]["threshold_s"] == results[1]["threshold_s"] < math.inf
    assert len(results[0]["computed"]) > len(results[1]["computed"]) >= 10 * M + 6
    table, other = read_timings(path)
    assert table.shape == (5, 2, M), "the first five of ten steps are thrown away"
    assert (table[:, 1].sum(-1) > 5 * table[:, 0].sum(-1)).sum() >= 4, "a busy machine may hold rank 0 up once"
    assert (other >= 0).all()


@pytest.mark.alone
def test_equal_ranks_are_left_alone() -> None:
    results = fit("time", {"threshold": "auto", "warmup_steps": 8}, samples=2 * BATCH * M * 10)
    drop = 1 - sum(len(result["computed"]) for result in results) / (2 * M * 10)
    assert drop <= 0.1, "the default may drop a tenth of the measured micro-batches"


def test_extra_steps_make_up_for_what_was_dropped() -> None:
    plan = [[2] * 40, [4] * 40]  # a quarter is dropped: every fourth step adds one
    results = fit("planned", {"plan": plan, "compensate": "extra_steps"}, max_steps=12, max_epochs=-1)
    steps = results[0]["global_step"]
    computed = sum(len(result["computed"]) for result in results)
    assert steps == results[0]["max_steps"] == 12 + (steps * 2) // (2 * M)
    assert computed >= 12 * 2 * M - 2 * M


@pytest.mark.parametrize("root", NAMESPACES)
def test_the_string_is_known(root: str) -> None:
    import lightning_eff  # noqa: F401

    strategy = trainer("dropcompute", root, accumulate_grad_batches=4).strategy
    assert type(strategy).__name__ == "DropComputeStrategy"
    assert strategy.threshold == "auto"
    assert any(base.__module__.startswith(root) for base in type(strategy).__mro__)


def _refused(rank: int, world: int, what: str) -> str:
    from lightning_eff.strategies import DropComputeStrategy

    hooks: dict[str, Any] = {}
    options: dict[str, Any] = {"accumulate_grad_batches": M}
    strategy = DropComputeStrategy(threshold=1.0, process_group_backend="gloo")
    if what == "sync_batchnorm":
        options["sync_batchnorm"] = True
    if what == "manual":
        options["accumulate_grad_batches"] = 1

        def training_step(self: Any, batch: Any, batch_idx: int) -> None: ...

        hooks = {"training_step": training_step, "automatic_optimization": False}
    if what == "log":

        def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[misc]
            loss = loss_of(self.net, batch[0])
            self.log("loss", loss, on_step=True, sync_dist=True)
            return loss

        hooks = {"training_step": training_step}
    if what == "all_gather":

        def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[misc]
            return self.all_gather(loss_of(self.net, batch[0]), sync_grads=True).mean()

        hooks = {"training_step": training_step}
    model = task(**hooks)
    try:
        trainer(strategy, **options).fit(model, loader(rank, world, SAMPLES))
    except UnsupportedCombinationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sync_batchnorm", "cannot be combined with SyncBatchNorm"),
        ("manual", "needs automatic optimization"),
        ("log", r"training_step calls reduce\(\) between the ranks"),
        ("all_gather", r"training_step calls all_gather\(\) between the ranks"),
    ],
)
def test_what_would_wait_for_a_rank_is_refused(what: str, message: str) -> None:
    import re

    for told in run_ranks(_refused, 2, what, init_group=False):
        assert re.search(message, told)


def test_a_file_that_is_not_for_timings_is_refused_before_the_run(tmp_path: Path) -> None:
    from lightning_eff.strategies.dropcompute.compatibility import refuse_trainer

    (tmp_path / "train.py").write_text("import torch\nprint(1)")
    runner: Any = SimpleNamespace(
        lightning_module=SimpleNamespace(automatic_optimization=True), accumulate_grad_batches=2, is_global_zero=True
    )
    for name, said in (("train.py", "holds something else"), ("none/run.csv", "there is no folder")):
        with pytest.raises(ConfigurationError, match=said):
            refuse_trainer(runner, layer_sync=None, record_timings=str(tmp_path / name))


def _one_micro_batch(rank: int, world: int) -> list[str]:
    import warnings

    from lightning_eff.strategies import DropComputeStrategy

    runner = trainer(DropComputeStrategy(process_group_backend="gloo"), fast_dev_run=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        runner.fit(task(), loader(rank, world, 16), loader(rank, world, 16))
    return [str(warning.message) for warning in told if issubclass(warning.category, NoEffectWarning)]


def test_one_micro_batch_per_step_is_told_to_change_nothing() -> None:
    for told in run_ranks(_one_micro_batch, 2, init_group=False):
        assert len(told) == 1
        assert "accumulate_grad_batches=1" in told[0]


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": "soon"},
        {"threshold": -1.0},
        {"threshold": True},
        {"warmup_steps": 5},
        {"max_drop_rate": 0.0},
        {"normalize": "own"},
        {"min_micro_batches": 0},
        {"compensate": "lr"},
        {"re_estimate_every_n_steps": -1},
        {"delay": "stal"},
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    from lightning_eff.strategies import DropComputeStrategy

    with pytest.raises(ConfigurationError, match=next(iter(options))):
        DropComputeStrategy(**options)
