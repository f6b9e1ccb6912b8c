"""What the options of ``strategy="pipelined_bp"`` may be."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lightning_eff.checks import ON_NONFINITE, TIMEOUT, Choice, Either, Maybe, Names, Real, Rule, Text, Whole, YesNo

__all__ = ["HORIZON", "OPTIONS", "SHRINK"]

HORIZON = Maybe(Real(0, 1000))
"""A multiple of each stage's delay; weights predicted further ahead have nothing to do with those to come."""
SHRINK = Real(0, 1, above=True)
OPTIONS: Mapping[str, Rule] = MappingProxyType({
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
    "process_group_backend": Maybe(Text("the name of a backend ('gloo', 'nccl')", ".+")),
    "timeout_s": TIMEOUT,
})  # fmt: skip
