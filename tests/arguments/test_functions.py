"""Functions whose cost or branches depend on a number or a word: they take what is given, or say why not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.errors import EffError
from lightning_eff.functional.numerics.dfp16 import dfp_codes
from lightning_eff.functional.numerics.flexpoint import autoflex_init, flex_codes
from lightning_eff.functional.numerics.lognormal import best_format, threshold_for
from lightning_eff.functional.numerics.luq import luq_scale, smp_quantize
from lightning_eff.functional.numerics.sawb import sawb_codes
from lightning_eff.functional.partition import balance
from lightning_eff.functional.staleness.mitigation import spike_coefficients
from lightning_eff.functional.staleness.schedule import stage_delay, utilisation
from lightning_eff.functional.staleness.stability import max_stable_lr
from lightning_eff.functional.stragglers.model import best_threshold, ideal_threshold, predicted
from lightning_eff.functional.stragglers.simulated import StallDelay, parse_delay
from lightning_eff.functional.stragglers.threshold import extra_steps, gradient_factor
from lightning_eff.optim import bf16_updates
from lightning_eff.plan.dropcompute import plan_row
from lightning_eff.plan.timings import DelaySource
from lightning_eff.strategies.pipelined_bp.mitigation import parse_mitigation
from tests.arguments.values import WILD

CALLABLE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "smp_quantize": (smp_quantize, {"x": torch.ones(3), "samples": 2, "levels": 7}),
    "luq_scale": (luq_scale, {"max_abs": torch.tensor(1.0), "levels": 7}),
    "flex_codes": (flex_codes, {"x": torch.ones(3), "scale": 1.0, "bits": 16, "rounding": "nearest"}),
    "dfp_codes": (dfp_codes, {"x": torch.ones(3), "bits": 16}),
    "sawb_codes": (sawb_codes, {"x": torch.ones(3), "bits": 4, "unsigned": False}),
    "autoflex_init": (autoflex_init, {"max_abs": 1.0, "bits": 16}),
    "best_format": (best_format, {"bits": 8, "sigma2": 3.0}),
    "threshold_for": (threshold_for, {"sparsity": 0.5, "sigma": 1.0}),
    "stage_delay": (stage_delay, {"stage": 0, "stages": 3, "in_flight": 2}),
    "utilisation": (utilisation, {"samples": 5, "stages": 3}),
    "spike_coefficients": (spike_coefficients, {"momentum": 0.9, "delay": 2}),
    "max_stable_lr": (max_stable_lr, {"curvature": 1.0, "delay": 2, "momentum": 0.5, "mitigation": "none"}),
    "balance": (balance, {"costs": [1.0, 2.0], "parts": 2}),
    "predicted": (predicted, {"table": torch.ones(2, 2, 2), "other": 0.0, "tau": 1.0, "min_micro_batches": 1}),
    "best_threshold": (best_threshold, {"table": torch.ones(2, 2, 2), "max_drop_rate": 0.1, "min_gain": 0.0}),
    "ideal_threshold": (ideal_threshold, {"table": torch.ones(2, 2, 2), "other": 0.0, "candidates": 5}),
    "extra_steps": (extra_steps, {"steps": 10, "drop_rate": 0.1}),
    "gradient_factor": (gradient_factor, {"counts": torch.ones(2), "micro_batches": 3, "normalize": "computed"}),
    "parse_delay": (parse_delay, {"spec": "stall"}),
    "parse_mitigation": (parse_mitigation, {"text": "lwp", "horizon": None, "gamma": 0.5, "stash": False}),
    "bf16_updates": (lambda update: bf16_updates(sgd(), update=update), {"update": "split"}),
    "plan_row": (
        lambda **options: plan_row(DelaySource(StallDelay(), 4), **options),
        {"workers": 2, "steps": 3, "window_steps": 3, "repetitions": 1, "min_micro_batches": 1, "max_drop_rate": 1.0},
    ),
}
"""Functions whose time, memory or branches depend on a number or a word: the options that are tried, and good ones."""
TENSORS = {"x", "max_abs", "scale", "table", "other", "counts", "costs", "stash", "steps"}
SMALL = [v for v in WILD if type(v) is not int or v <= 100]


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], lr=0.1)


@pytest.mark.parametrize("name", CALLABLE)
def test_functions_take_their_numbers_and_words_or_say_why_not(name: str) -> None:
    function, good = CALLABLE[name]
    function(**good)
    for option in set(good) - TENSORS:
        for value in SMALL if name == "plan_row" else WILD:
            with contextlib.suppress(EffError):
                function(**{**good, option: value})
