"""Options of strategy="pipelined_bp": what they may be, and one typed error for all else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_eff.errors import ConfigurationError
from lightning_eff.strategies import PipelinedBPStrategy

ALLOWED: dict[str, list[Any]] = {
    "module": [None, "net", ""],
    "stages": [None, "auto", "layers", 1, 4, ["net.1"], ("a", "b")],
    "mitigation": ["lwp+sc", "none", "stash+shrink"],
    "horizon": [None, 0, 1.5, 2],
    "micro_batch_size": [None, 1, 4],
    "stash": [False, True],
    "in_flight": [1, 2, 5],
    "shrink_factor": [0.5, 1],
    "curvature": [None, "measure", 0.1, 7],
    "on_nonfinite": ["raise", "warn"],
    "timeout_s": [0.5, 1800, 1e9],
}


ODD = [
    -1, 0, 2.5, -math.inf, math.inf, math.nan, 10**400, True, "", "yes", "none", b"net", [], ["net", 3], [None], {},
    {"a": 1}, object(), nn.Linear(1, 1), torch.tensor(2.0), torch.ones(2), np.ones(2), np.array(["auto"] * 2), 1j, int,
]  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_every_option_takes_what_it_says(name: str) -> None:
    for value in ALLOWED[name]:
        made = PipelinedBPStrategy(**{name: value})
        if name not in {"horizon", "mitigation", "shrink_factor", "stash", "timeout_s"}:
            assert getattr(made, name) == (tuple(value) if isinstance(value, list) else value)


values = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.text(max_size=3)))


TAKEN: dict[str, Any] = {
    **dict.fromkeys(("module", "mitigation"), str),
    **dict.fromkeys(("stages", "micro_batch_size", "in_flight"), int),
    **dict.fromkeys(("horizon", "shrink_factor", "curvature", "timeout_s"), int | float),
    "on_nonfinite": (),
}
"""What of :data:`ODD` an option may be."""


def refused_with(options: dict[str, Any]) -> str:
    """The message of the ConfigurationError, or nothing."""
    try:
        PipelinedBPStrategy(**options)
    except ConfigurationError as error:
        return str(error)
    return ""


@given(st.dictionaries(st.sampled_from(sorted(TAKEN)), values, min_size=1, max_size=3))
@settings(max_examples=150)
def test_any_option_makes_a_strategy_or_one_typed_error(options: dict[str, Any]) -> None:
    told = refused_with(options)
    assert not told or any(f"{name}=" in told for name in options)


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_odd_values_one_by_one(name: str) -> None:
    for value in ODD:
        told = refused_with({name: value})
        taken = isinstance(value, TAKEN[name]) and not isinstance(value, bool)
        if told:
            assert f"{name}=" in told
        else:
            assert taken, f"{name}={value!r}"
            assert isinstance(value, str) or 0 <= value < math.inf
    assert any(refused_with({name: value}) for value in ODD)
