"""Ranks of unequal speed, in seconds: thresholds on compute time, its distribution, delays, recorded times.

threshold       which micro-batches a threshold leaves, and what it does to the gradient
model           expected times and the best threshold, from recorded times or in closed form
simulated       delays that make ranks slow on purpose
timings         recorded times on disk
"""

from lightning_eff.functional.stragglers.model import (
    Prediction,
    best_threshold,
    expected_micro_batches,
    expected_slowest,
    expected_speedup,
    ideal_speedup,
    ideal_threshold,
    predicted,
)
from lightning_eff.functional.stragglers.simulated import (
    Delay,
    LognormalDelay,
    SlowRankDelay,
    StallDelay,
    TraceDelay,
    hashed_uniform,
    parse_delay,
)
from lightning_eff.functional.stragglers.threshold import (
    Timings,
    check_min_micro_batches,
    check_timings,
    completed,
    compute_times,
    extra_micro_batches,
    extra_steps,
    gradient_factor,
    starts_next,
    step_times,
)
from lightning_eff.functional.stragglers.timings import append_timings, check_target, read_timings, write_timings

__all__ = [
    "Delay",
    "LognormalDelay",
    "Prediction",
    "SlowRankDelay",
    "StallDelay",
    "Timings",
    "TraceDelay",
    "append_timings",
    "best_threshold",
    "check_min_micro_batches",
    "check_target",
    "check_timings",
    "completed",
    "compute_times",
    "expected_micro_batches",
    "expected_slowest",
    "expected_speedup",
    "extra_micro_batches",
    "extra_steps",
    "gradient_factor",
    "hashed_uniform",
    "ideal_speedup",
    "ideal_threshold",
    "parse_delay",
    "predicted",
    "read_timings",
    "starts_next",
    "step_times",
    "write_timings",
]
