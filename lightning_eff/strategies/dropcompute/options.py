"""What the options of ``strategy="dropcompute"`` may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from lightning_eff.checks import (
    ON_NONFINITE,
    TIMEOUT,
    Choice,
    Either,
    Instance,
    Maybe,
    Real,
    Rule,
    Text,
    Whole,
    YesNo,
)
from lightning_eff.functional.stragglers.simulated import Delay
from lightning_eff.functional.stragglers.threshold import NORMALIZE

__all__ = ["OPTIONS", "UNSETTLED_STEPS"]

UNSETTLED_STEPS = 5
"""Steps at the beginning of a run whose times say nothing about later ones."""

OPTIONS: Mapping[str, Rule] = MappingProxyType({
    "threshold": Either(Choice("auto"), Real(0, math.inf)),
    "warmup_steps": Whole(UNSETTLED_STEPS + 1, 10_000, "their times are gathered and searched as a whole"),
    "max_drop_rate": Real(0, 1, above=True),
    "normalize": NORMALIZE,
    "min_micro_batches": Whole(1),
    "include_data_time": YesNo(),
    "compensate": Choice(None, "extra_steps"),
    "re_estimate_every_n_steps": Whole(),
    "delay": Maybe(Either(Text("a kind of delay or the path of a CSV file"), Instance(Delay, "a Delay"))),
    "record_timings": Maybe(Text("the path of a file", r"[^\0]+")),
    "on_nonfinite": ON_NONFINITE,
    "process_group_backend": Maybe(Text("the name of a backend ('gloo', 'nccl')", ".+")),
    "timeout_s": TIMEOUT,
})  # fmt: skip
