"""What every precision plugin with quantised layers shares: conversion, its undoing, figures, state.

A mixin without Lightning: the public classes join it to the ``Precision`` class of whichever Lightning is used.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Generator
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from lightning_eff.errors import NoEffectWarning
from lightning_eff.integration.attached import trainer_of
from lightning_eff.integration.graft import check_strategy
from lightning_eff.precision.formats.base import LayerOptions
from lightning_eff.precision.formats.history import History, advance, learned, warn_of_other_layers
from lightning_eff.precision.gradients import ZeroEngine, broken_gradients, zero_engine
from lightning_eff.precision.layers.convert import Conversion, convert
from lightning_eff.precision.layers.report import change_line, conversion_table, readable_bytes
from lightning_eff.precision.layers.state import LayerState
from lightning_eff.precision.method import keys_of_variants
from lightning_eff.precision.models import ConvertedModels
from lightning_eff.precision.run import Aside, StepsMixin
from lightning_eff.runtime.figures import console, log_figures, of_method
from lightning_eff.runtime.finite import FIND_OPERATION, stop_if_broken
from lightning_eff.runtime.ranks import rank
from lightning_eff.runtime.runs import Run
from lightning_eff.runtime.seeds import SeedStream


class QuantizedPrecisionMixin(StepsMixin):
    """Converts a model's layers when a run starts, converts them back when it ends.

    Subclasses set ``info`` and ``options_class``.
    """

    options_class: ClassVar[type[LayerOptions]]
    """The options of the method, which make its format."""
    options: LayerOptions

    def _begin(self, **options: Any) -> None:
        """See the base class."""
        self.options = self.options_class(**options)
        self.seeds = SeedStream()
        self.metrics: dict[str, float] = {}
        self.weights_only = False
        self._models = ConvertedModels()
        self._loaded: dict[str, dict[str, Any]] = {}
        self._steps = 0
        self._context = ""
        self._run = Run()

    def __getstate__(self) -> dict[str, Any]:
        """Return the options and what is remembered; the models, and the run, are the original's."""
        return {**self.__dict__, "_models": ConvertedModels(), "_loaded": self._remembered(), "_aside": None}

    def _forget_run(self) -> None:
        """Begin without what another run has left behind: its rounding stream, phase, estimates and figures."""
        self.seeds.seed = None
        self.seeds.calls = 0
        self.weights_only = False
        self.metrics = {}
        self._loaded = {}
        self._steps = 0
        self._context = ""
        self._told = False

    def _restart(self) -> None:
        """Forget what layers have seen: it belongs to the state that a checkpoint replaces."""
        self._steps = 0
        for state in self.states().values():
            state.histories = state.format.histories()
        self._invalidate()
        self._apply_state()

    def _put_aside(self) -> Aside:
        """Return the rounding stream and the phase; the estimates are of the weights, whoever loaded them."""
        return Aside(self.seeds.seed, self.seeds.calls, self.weights_only)

    def _take_back(self, aside: Aside) -> None:
        """Undo :meth:`_put_aside`."""
        self.seeds.seed = aside.seed
        self.seeds.calls = aside.calls
        self.weights_only = aside.weights_only

    # ------------------------------------------------------------------------------------------ conversion

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the layers of ``module`` in place, once, and print what became of each."""
        module = super().convert_module(module)
        self._start_run(module)
        trainer = trainer_of(module)
        if trainer is not None:
            check_strategy(self.info, trainer.strategy)
        if module not in self._models:
            device = None if trainer is None else getattr(trainer.strategy, "root_device", None)
            device = device or next((p.device for p in module.parameters()), torch.device("cpu"))
            conversion = convert(module, self.options, self.seeds, device)
            self._models.add(module, conversion)
            self._apply_state()
            self._report(conversion, device)
        return module

    def _refresh(self) -> None:
        """Convert what has come into a model since the last step, give back what has gone, and say so."""
        changes = self._models.update()
        if changes:
            self._apply_state()
        for change in changes if rank() == 0 else ():
            line = change_line(change, method=self.info.name, step=self._current_step())
            console().print(line, highlight=False, soft_wrap=True)

    def _report(self, conversion: Conversion, device: torch.device) -> None:
        if not conversion.states:
            warnings.warn(
                f"{self.info.name} converted no layer of this model, so it changes nothing: "
                + "; ".join(f"{row.name or '(model)'} ({row.kind}): {row.reason}" for row in conversion.rows[:8]),
                NoEffectWarning,
                stacklevel=4,
            )
        elif rank() == 0:
            console().print(conversion_table(conversion, method=self.info.name, device=device))

    def states(self) -> dict[str, LayerState]:
        """Return layer name -> state, of every converted layer."""
        return self._models.states()

    def saved_bytes(self) -> tuple[int, int]:
        """Return the bytes converted layers kept for backward in their last forward, and float32 would have kept."""
        return self._models.saved_bytes()

    def teardown(self) -> None:
        """Give every layer its class back and say what the method did."""
        if self._steps and self.saved_bytes()[1] and rank() == 0:
            for part in self._verdict():
                console().print(part, highlight=False)
        self._loaded = self._remembered()  # for a checkpoint that is saved now
        self._models.undo()
        self._steps = 0
        self._end_run()
        super().teardown()

    def _verdict(self) -> list[str | Table]:
        """Return what a run prints at its end."""
        kept, full = self.saved_bytes()
        line = (
            f"{self.info.name}: {self._models.layers} layers trained for {self._steps} steps; for backward they kept "
            f"{readable_bytes(kept)} instead of {readable_bytes(full)} in float32 ({kept / full:.3f}x)."
        )
        return [line]

    # ------------------------------------------------------------------------------------------ steps

    def _enter(self, context: str) -> None:
        """Forget weight codes between training and evaluation: weights may be exchanged there unseen (EMA, SWA)."""
        if context != self._context:
            self._context = context
            self._invalidate()
            for state in self.states().values() if context == "train" else ():
                state.histories = learned(state.histories, state.format.histories())
            for history in self.histories():
                history.forget()

    def _invalidate(self) -> None:
        for state in self.states().values():
            state.invalidate()

    @contextlib.contextmanager
    def train_step_context(self) -> Generator[None]:
        """Bring the layers up to date for a training step."""
        self._refresh()
        self._enter("train")
        self._sample(self._current_step())
        with super().train_step_context():
            yield

    @contextlib.contextmanager
    def val_step_context(self) -> Generator[None]:
        """Bring the layers up to date for a validation step."""
        self._refresh()
        self._enter("val")
        self._sample(0)
        with super().val_step_context():
            yield

    def after_backward(self, model: Any) -> None:
        """Check the gradients and publish sampled figures, between backward and the optimizer (Trainer)."""
        self._check_finite(step=model.trainer.global_step, engine=zero_engine(model))
        self._publish(model.trainer)

    def _look_at_gradients(self) -> None:
        """Check the gradients, publish sampled figures."""
        self._check_finite(step=self._current_step())
        if (trainer := self._models.trainer) is not None:
            self._publish(trainer)

    def _check_finite(self, step: int, engine: ZeroEngine | None = None) -> None:
        """Stop a non-finite gradient before it reaches a parameter, on every rank alike."""
        parameters = self._models.parameters()
        if broken := broken_gradients(parameters, engine):
            stop_if_broken(
                self.info.name,
                broken,
                where=f"at optimizer step {step} (rank {rank()})",
                on_nonfinite=self.options.on_nonfinite,
                of=sum(p.requires_grad for _, p in parameters),
                advice=FIND_OPERATION,
            )

    def _take_in_step(self, optimizer: Optimizer) -> None:
        """Have weight codes made anew, and let the estimates take in what was observed."""
        self._steps += 1
        self._invalidate()
        self._after_step(optimizer)
        advance(self.histories(), self._models.device, replicas=self._replicas())
        self._sample(self._current_step())

    def _after_step(self, optimizer: Optimizer) -> None:
        """Change the weights an optimizer has just updated, where a method does."""

    def histories(self) -> list[History]:
        """Return what all layers remember, in the same order on every rank."""
        return [history for state in self.states().values() for history in state.histories.values()]

    def predicts_scales(self) -> bool:
        """Return whether any layer predicts a scale; see :class:`lightning_eff.runtime.contracts.ScalePredictor`."""
        return bool(self.histories())

    @contextlib.contextmanager
    def unchanged(self) -> Generator[None]:
        """Keep nothing of what the layers draw and observe within: rounding stream, phase and predictions go back."""
        before = self.state_dict()
        try:
            yield
        finally:
            self.load_state_dict(before)
            for history in self.histories():
                history.forget()

    def _sample(self, step: int) -> None:
        """Take the figures in step ``step`` if it is one of every n."""
        every = self.options.measure_every_n_steps
        for state in self.states().values():
            state.step = step
            state.measure = every > 0 and step > 0 and step % every == 0

    def _current_step(self) -> int:
        """Return the optimizer steps of the whole run, those before a resume counted."""
        return self._run.steps(self._steps)

    def _replicas(self) -> int | None:
        """Return how often the model is there, if a Trainer knows; a pipeline's ranks hold one between them."""
        trainer = self._models.trainer
        return None if trainer is None else int(trainer.world_size)

    def _publish(self, trainer: Any) -> None:
        """Log the figures of a sampled step, the mean over the layers where they are finite (SQNR may not be)."""
        collected: dict[str, list[float]] = {}
        for state in self.states().values():
            for key, value in state.metrics.items():
                collected.setdefault(key, []).append(float(value))
            state.metrics = {}
        finite = {key: [v for v in values if math.isfinite(v)] for key, values in collected.items()}
        if collected:
            means = {key: statistics.mean(values) for key, values in finite.items() if values}
            self.metrics = of_method(self.info.name, means)
            log_figures(trainer, self.metrics, step=self._current_step())

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings: the phase, the rounding stream, and what the layers remember."""
        own = {
            "seed": self.seeds.seed,
            "calls": self.seeds.calls,
            "phase": "weights_only" if self.weights_only else "quantized",
            "memory": self._remembered(),
        }
        kept = {key: value for key, value in own.items() if key in self.info.state_keys}
        return {**super().state_dict(), **kept}

    def _remembered(self) -> dict[str, dict[str, Any]]:
        """Return what each layer remembers; after the run, what it did then."""
        now = {
            name: {role: history.estimate.state_dict() for role, history in state.histories.items()}
            for name, state in self.states().items()
            if state.histories
        }
        return {**self._loaded, **now}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the rounding stream, the phase and what the layers remember.

        Raises:
            CheckpointError: the state is damaged, or lacks what an exact resume needs; nothing is changed.
        """
        own = self.info.read_state(state_dict, known={*self.state_dict(), *keys_of_variants(self.info)})
        predicting = {name for name, state in self.states().items() if state.histories}
        warn_of_other_layers(self.info.name, own.get("memory", {}), predicting)
        self._take(own)
        others = {key: value for key, value in state_dict.items() if key not in keys_of_variants(self.info)}
        super().load_state_dict(others)

    def _take(self, own: dict[str, Any]) -> None:
        """Go on from a state that has been looked at."""
        self.weights_only = own["phase"] == "weights_only"
        self.seeds.seed = own.get("seed")
        self.seeds.calls = own.get("calls", 0)
        self._loaded = own.get("memory", {})
        self._restart()

    def _apply_state(self) -> None:
        for name, state in self.states().items():
            state.weights_only = self.weights_only
            for role, values in self._loaded.pop(name, {}).items():  # once: from then on the layer knows better
                if role in state.histories:
                    state.histories[role].load(values)

    def begin_fine_tuning(self) -> None:
        """Quantise the weights alone from now on; inputs, gradients and products are in high precision."""
        self._set_phase(weights_only=True)

    def end_fine_tuning(self) -> None:
        """Quantise everything again from now on."""
        self._set_phase(weights_only=False)

    def _set_phase(self, *, weights_only: bool) -> None:
        self.weights_only = weights_only
        for state in self.states().values():
            state.weights_only = weights_only
