"""What the options of the strategies may be."""

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
    Names,
    Real,
    Rule,
    Text,
    Whole,
    YesNo,
)
from lightning_eff.functional.stragglers.simulated import Delay
from lightning_eff.functional.stragglers.threshold import NORMALIZE

UNSETTLED_STEPS = 5
"""Steps at the beginning of a run whose times say nothing about later ones."""
_BACKEND = Maybe(Text("the name of a backend ('gloo', 'nccl')", ".+"))

DROPCOMPUTE: Mapping[str, Rule] = MappingProxyType({
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
    "process_group_backend": _BACKEND,
    "timeout_s": TIMEOUT,
})  # fmt: skip
HORIZON = Maybe(Real(0, 1000))
"""A multiple of each stage's delay; weights predicted further ahead have nothing to do with those to come."""
SHRINK = Real(0, 1, above=True)
PIPELINED_BP: Mapping[str, Rule] = MappingProxyType({
    "module": Maybe(Text("the name of a module")),
    "stages": Maybe(Either(Whole(1, 2**16), Choice("auto", "layers"), Names("a list of layer names", 1))),
    "mitigation": Text("parts joined with '+', as in 'lwp+sc'"),
    "horizon": HORIZON,
    "micro_batch_size": Maybe(Whole(1, 2**24, "samples of one forward pass")),
    "stash": YesNo(),
    "in_flight": Whole(1, 64, "each keeps its activations, and a copy of the weights of every stage before the last"),
    "shrink_factor": SHRINK,
    "curvature": Maybe(Either(Choice("measure"), Real(0, above=True))),
    "on_nonfinite": ON_NONFINITE,
    "schedule_picture": YesNo(),
    "process_group_backend": _BACKEND,
    "timeout_s": TIMEOUT,
})  # fmt: skip
