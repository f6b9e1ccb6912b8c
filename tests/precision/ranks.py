"""A fit on one of two ranks, as the tests of replicas make it."""

from __future__ import annotations

from typing import Any

import torch

from tests.precision.models import DATA, TARGET, trainer


def _loader(rank: int, *, same: bool = False) -> Any:
    """Batches of this rank's half of the data, or of the same data on every rank."""
    part = slice(0, 32) if same else slice(rank * 32, rank * 32 + 32)
    data = torch.utils.data.TensorDataset(DATA[part], TARGET[part])
    return torch.utils.data.DataLoader(data, batch_size=8)


def fit_on_rank(rank: int, model: Any, *, same: bool = False, seed: int = 3, resume: Any = None, **options: Any) -> Any:
    """Fit on one of two ranks under DDP; return the Trainer."""
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo")
    runner = trainer(devices=2, strategy=strategy, use_distributed_sampler=False, **options)
    torch.manual_seed(seed)
    runner.fit(model, _loader(rank, same=same), ckpt_path=resume)
    return runner
