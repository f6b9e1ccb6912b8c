"""Options: every bad one is refused by name, every good one trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.errors import ConfigurationError
from lightning_eff.precision.formats.luq import LUQOptions
from tests.precision.models import converted

BAD: list[tuple[str, Any]] = [
    *(("levels", v) for v in (1, 9, 7.0, "7", None, True)),
    *(("samples", v) for v in (0, -1, 1.5, None, True)),
    *(("measure_every_n_steps", v) for v in (-1, 1.0, None, False)),
    *(("unsigned", v) for v in (True, None, "mirror", "MIRROR5", 5, [])),
    *(("gradient_rounding", v) for v in ("up", None, 1, "LUQ", False)),
    *(("products", v) for v in ("int8", None, True, ["native"])),
    *(("on_nonfinite", v) for v in ("ignore", None, True)),
    *((name, v) for name in ("power_of_two", "exempt_first_last", "pack_relu") for v in (0, 1, None, "yes")),
    *(("hindsight", v) for v in (-0.1, 1.0, 1, float("nan"), "0.1", True, False)),
    *(("exempt", v) for v in ("head", [1], [None], None, 5, ["a", b"b"])),
]
GOOD: list[dict[str, Any]] = [
    *({"levels": v} for v in range(2, 9)),
    {"samples": 3},
    {"unsigned": False},
    {"unsigned": "reference"},
    {"hindsight": 0},
    {"hindsight": 0.9, "levels": 8},
    {"power_of_two": True},
    *({"gradient_rounding": v} for v in ("no_underflow", "no_log_rounding", "nearest")),
    {"products": "native", "samples": 2},
    {"products": "emulated"},
    {"measure_every_n_steps": 1},
    {"exempt": ["0"]},
    {"pack_relu": False},
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{name}="):
        LUQOptions(**{name: value})


def test_the_error_suggests() -> None:
    with pytest.raises(ConfigurationError, match=r"Did you mean 'native'"):
        LUQOptions(products="natve")  # type: ignore[arg-type]


def test_levels_beyond_int8_are_not_native() -> None:
    with pytest.raises(ConfigurationError, match="levels=8"):
        LUQOptions(levels=8, products="native")


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_a_good_value_trains(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    converted(model, **options)
    for _ in range(2):  # the second step has an in-hindsight maximum
        model(torch.randn(5, 2, 6, 6)).square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in gradients)
