"""Batches of a pipeline: split into micro-batches, and told apart by a fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.errors import ConfigurationError
from lightning_eff.strategies.pipelined_bp import batches


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
