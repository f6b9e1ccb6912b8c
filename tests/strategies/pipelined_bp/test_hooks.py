"""Parts of strategy="pipelined_bp": what is changed in Lightning's loop and put back, and what a run's figures say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.strategies.pipelined_bp import batches, hooks, report, timeline
from lightning_eff.strategies.pipelined_bp.timeline import Sums, Timeline
from tests.strategies.pipelined_bp.test_parts import CPU, SGD, HandMade, optimizer


def test_an_optimizers_step_is_its_schedulers_again() -> None:
    sgd = optimizer(SGD)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.5**step)
    wrapped, calls = sgd.step, []
    with hooks.replace_step(sgd, lambda step: calls.append("update") or step()):
        assert sgd.step(lambda: calls.append("closure") or 3) == 3
    assert calls == ["closure", "update"]
    assert sgd.step is wrapped
    schedule.step()  # it warns (an error here) unless the optimizer's own step was run before
    with pytest.raises(ArithmeticError), hooks.replace_step(sgd, lambda step: step()):
        raise ArithmeticError
    assert sgd.step is wrapped
    plain = optimizer(SGD)
    with hooks.replace_step(plain, lambda step: step()):
        assert "step" in plain.__dict__
    assert "step" not in plain.__dict__


def loader(dataset: Any = None, **options: Any) -> Any:
    rows = torch.utils.data.TensorDataset(torch.arange(24.0)) if dataset is None else dataset
    return torch.utils.data.DataLoader(rows, **{"batch_size": 8, **options})


class Stream(torch.utils.data.IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.arange(12.0))


def test_smaller_batches_come_from_the_same_loader() -> None:
    given = loader(
        sampler=torch.utils.data.SubsetRandomSampler(range(20), generator=torch.Generator().manual_seed(1)),
        collate_fn=len, num_workers=1, generator=torch.Generator().manual_seed(3), drop_last=True, timeout=7,
        worker_init_fn=print, prefetch_factor=5, persistent_workers=True,
    )  # fmt: skip
    made = batches.split_batches(given, 4)
    assert made.batch_size == 4
    kept = ("dataset", "sampler", "collate_fn", "num_workers", "generator", "drop_last", "timeout", "worker_init_fn")
    for name in (*kept, "prefetch_factor", "persistent_workers", "pin_memory", "multiprocessing_context"):
        assert getattr(made, name) is getattr(given, name), name
    assert given.batch_size == 8
    assert batches.split_batches(given, 8) is given


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"dataset": Stream()}], ids=["order", "shuffle", "stream"])
def test_they_hold_the_same_samples(options: dict[str, Any]) -> None:
    def rows(given: Any) -> list[Tensor]:
        torch.manual_seed(3)
        return [batch[0] if isinstance(batch, list) else batch for batch in given]

    given = loader(**options)
    whole, parts = rows(given), rows(batches.split_batches(given, 4))
    assert torch.equal(torch.cat(whole), torch.cat(parts))
    assert {len(part) for part in parts} == {4}


@pytest.mark.parametrize(
    ("given", "size", "told"),
    [
        (loader, 3, "micro_batch_size=3 does not divide the loader's batch_size=8"),
        (loader, 16, "does not divide"),
        (lambda: [1, 2], 4, "needs a torch DataLoader"),
        (lambda: loader(batch_size=None), 4, "makes its batches in another way"),
        (
            lambda: loader(batch_size=1, batch_sampler=[[0, 1], [2, 3]]),
            2,
            "another way",
        ),
    ],
)
def test_a_loader_that_cannot_be_split_is_told(given: Callable[[], Any], size: int, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        batches.split_batches(given(), size)


BATCH: dict[str, Any] = {"x": torch.arange(600.0).view(3, 200), "y": [torch.tensor(1)], "name": "a"}


@pytest.mark.parametrize(
    "change",
    [
        {"x": BATCH["x"] + 1}, {"x": BATCH["x"].double()}, {"x": BATCH["x"].view(2, 300)}, {"x": BATCH["x"][:2]},
        {"x": BATCH["x"].flip(1)}, {"y": [torch.tensor(2)]}, {"y": []}, {"y": [torch.tensor(True)]},
    ],
)  # fmt: skip
def test_a_fingerprint_changes_with_the_data(change: dict[str, Any]) -> None:
    assert batches.fingerprint({**BATCH, **change}) != batches.fingerprint(BATCH)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64, torch.uint8, torch.float64], ids=str)
def test_every_batch_has_a_fingerprint(dtype: torch.dtype) -> None:
    many = [torch.ones(shape, dtype=dtype) for shape in ((), (0, 3), (3, 200), (1,))]
    found = [batches.fingerprint(t) for t in many]
    assert found == [batches.fingerprint(t.clone()) for t in many]
    assert all(0 <= code < 2**32 for code in found)
    assert len(set(found)) == 4
    assert batches.fingerprint(many[2].t().t()) == found[2]
    assert batches.fingerprint(None) == batches.fingerprint("no tensor") == 0


class Model:
    """What of a LightningModule schedulers are stepped through."""

    def __init__(self) -> None:
        self.stepped: list[Any] = []

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.stepped.append((scheduler, metric))


def test_a_scheduler_waits_for_the_update_of_its_sample() -> None:
    class Count:
        samples = updates = 0

    model, count, known = Model(), Count(), []
    steps = hooks.SchedulerSteps(model, lambda: known[0] if known else None)
    assert "lr_scheduler_step" not in model.__dict__
    undo = steps.install()
    model.lr_scheduler_step("before the first batch", None)
    assert model.stepped == [("before the first batch", None)]
    known.append(count)
    for i in range(5):  # two samples late
        count.samples = i + 1
        if i >= 2:
            count.updates = i - 1
            steps.run_due()
        model.lr_scheduler_step("step", i)
        assert model.stepped[1:] == [("step", done) for done in range(count.updates)]
    count.updates = 5  # drained
    steps.run_due()
    assert model.stepped[1:] == [("step", i) for i in range(5)]
    undo()
    assert "lr_scheduler_step" not in model.__dict__


# ---------------------------------------------------------------------------------------------------- figures


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the time on."""
    now = [100.0]
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: now[0])

    def forth(seconds: float) -> None:
        now[0] += seconds

    return forth


def test_a_timeline_sums_what_was_done(clock: Callable[[float], None]) -> None:
    line = Timeline(1, CPU)
    line.pause()
    for i in range(3):
        for kind, seconds in (
            ("wait", 1),
            ("forward", 2),
            ("transfer", 4),
            ("backward", 8),
            ("update", 16),
            ("other", 32),
        ):
            line.switch(kind, i)  # type: ignore[arg-type]
            clock(seconds)
        line.count_micro_batch(staleness=i)
        line.pause()
        clock(1000)  # a validation counts nowhere
    recent = line.take_recent()
    assert (recent.busy_s, recent.wait_s, recent.transfer_s, recent.other_s) == (3 * 26, 3, 12, 96)
    assert (recent.micro_batches, recent.staleness) == (3, 3)
    assert recent.utilisation == 26 / 63
    assert recent.per_micro_batch(recent.staleness) == 1.0
    assert line.take_recent() == Sums()
    assert line.run == recent
    spans = line.spans()
    assert [(span.kind, span.end_s - span.start_s) for span in spans[:4]] == [
        ("wait", 1),
        ("forward", 2),
        ("backward", 8),
        ("update", 16),
    ]
    assert {span.micro_batch for span in spans} == {0, 1, 2}
    assert {span.stage for span in spans} == {1}


def test_a_long_run_keeps_its_last_micro_batches(clock: Callable[[float], None]) -> None:
    line = Timeline(0, CPU)
    for i in range(2000):
        line.switch("forward", i)
        clock(0.5)
        line.count_micro_batch(0)
    assert line.run.busy_s == 0.5 * 1999, "the last is still under way"
    assert len(line._spans) <= 16 * timeline.KEPT + 1
    assert {span.micro_batch for span in line.spans()} == set(range(1998 - timeline.KEPT, 1999))


def test_nothing_done_is_no_division_by_zero() -> None:
    assert Sums().utilisation == Sums().per_micro_batch(1.0) == 0.0
    assert Timeline(0, CPU).spans() == []
    assert report.save_picture([([], Sums())], "nowhere") is None
    (line,) = report.verdict([([], Sums())] * 2, HandMade().weights, None)
    assert "0 updates" in line


def test_the_verdict_says_how_busy_the_stages_were() -> None:
    weights = HandMade(mitigation="sc").weights
    weights.updates = 50
    (one,) = report.verdict([([], Sums())], weights, None)
    assert "50 updates with the delays of 3 stages in one process" in one
    assert "up to 4 updates late. mitigation=sc" in one
    busy, idle = Sums(busy_s=9, wait_s=1), Sums(busy_s=6, wait_s=1, transfer_s=1, other_s=2)
    line, where = report.verdict([([], busy), ([], idle)], weights, "there.svg")
    assert "50 updates in 10.0 s. Stages computed 90%, 60% of the time (mean 75%;" in line
    assert "cannot exceed 89%)" in line  # 8 / (8 + 2 - 1)
    assert "One process would have computed for 15.0 s: 1.50x" in line
    assert where == "pipelined_bp: the schedule is drawn in there.svg"
