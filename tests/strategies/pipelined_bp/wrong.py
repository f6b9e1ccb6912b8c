"""Wrong versions of the package, each in place for the length of a run: what compares runs has to notice them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning_eff.runtime.rng import Randomness
from lightning_eff.strategies.pipelined_bp import hooks, weights
from lightning_eff.strategies.pipelined_bp.engine import Engine
from lightning_eff.strategies.pipelined_bp.mitigation import Mitigation
from lightning_eff.strategies.pipelined_bp.weights import Weights
from tests.strategies.pipelined_bp.models import replaced

Within = Callable[[], contextlib.AbstractContextManager[Any]]


def one_update_less_late() -> Any:
    right = weights.stage_delay
    return replaced(weights, "stage_delay", lambda *given, **named: max(0, right(*given, **named) - 1))


def backward_with_the_forwards_weights() -> Any:
    return replaced(Mitigation, "stashes", property(lambda _: True))


def no_prediction() -> Any:
    return replaced(Weights, "predictions_of", lambda *_: [])


def no_spike() -> Any:
    return replaced(weights, "spike_coefficients", lambda *_: (1.0, 0.0))


def not_shrunk() -> Any:
    return replaced(weights, "shrink_factor", lambda *_: 1.0)


def no_versions_kept() -> Any:
    return replaced(Weights, "keep_versions", lambda _: None)


def scheduler_at_once() -> Any:
    return replaced(hooks.SchedulerSteps, "_later", lambda self, *given: self._step(*given))


def clip_over_all_stages() -> Any:
    return replaced(hooks, "clip_by_stage", lambda *_: lambda: None)


@contextlib.contextmanager
def _as_it_comes(*_: Any) -> Iterator[None]:
    yield


def no_streams() -> Any:
    return replaced(Randomness, "of", _as_it_comes)


def update_without_a_gradient() -> Any:
    """A stage steps as soon as its turn comes."""
    return replaced(Engine, "update", lambda self, step: self.weights.update(step))
