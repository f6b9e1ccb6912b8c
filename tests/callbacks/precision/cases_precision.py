"""The callbacks that change the precision, for the battery of callbacks."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_eff.methods import METHODS
from lightning_eff.testing import CallbackCase, Provocation

WIDE = {"width": 72}
"""Layers this wide are converted on any hardware."""


def _cases() -> Iterator[CallbackCase]:
    if "low_precision" in METHODS:
        yield CallbackCase(
            info=METHODS["low_precision"],
            options={"method": "luq4", "options": {"hindsight": 0.5}},
            neutral={"method": "luq4"},
            plain={"precision": "luq4"},  # it is the string in another form
            task_options=WIDE,
            wrong={"method": "luq5", "options": {"level": 3}},
            named=("luq4",),
            refusals={"what its method refuses": Provocation(trainer={"precision": "64-true"})},
        )
    if "luq_fine_tuning" in METHODS:
        yield CallbackCase(
            info=METHODS["luq_fine_tuning"],
            options={"steps": 6},
            neutral=None,
            no_neutral="at least one step is trained with INT4 weights alone",
            trainer={"precision": "luq4"},
            task_options=WIDE,
            wrong={"steps": 0, "base_lr": -1.0},
            refusals={
                "precision other than luq4": Provocation(trainer={"precision": "32-true"}),
                "no known end": Provocation(trainer={"max_epochs": -1}, error="ConfigurationError"),
                "manual_optimization with max_epochs and max_steps": Provocation(
                    trainer={"max_steps": 5}, task={"manual": True}, error="ConfigurationError"
                ),
            },
        )


CASES = tuple(_cases())
