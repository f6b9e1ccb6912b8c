"""Every method converts layers of any size here, and no test leaves a listener to optimizers behind."""

from __future__ import annotations

import pytest

from lightning_eff.precision.formats import fp8


@pytest.fixture(autouse=True)
def small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 converts layers of any size."""
    monkeypatch.setattr(fp8, "SLOW_FEATURES", 0)


@pytest.fixture(autouse=True)
def _nobody_listens(no_hook_is_left: None) -> None:
    """For every test of this folder."""
