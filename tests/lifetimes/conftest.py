"""Every method converts layers of any size here, and no test leaves a listener to optimizers behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_eff.optim.steps import STEPS
from lightning_eff.precision.formats import config


@pytest.fixture(autouse=True)
def small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 converts layers of any size."""
    monkeypatch.setattr(config, "SLOW_FEATURES", 0)


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    """Nobody listens to optimizers after the test who did not before; Fabrics of earlier tests may still be there."""
    before = list(STEPS._live())
    yield
    assert all(listener in before for listener in STEPS._live())
    assert before or not _global_optimizer_pre_hooks
    assert before or not _global_optimizer_post_hooks
