"""``strategy="dropcompute"``: data parallelism that does not wait for stragglers.

References:
    Giladi, Gottlieb, Shkolnik, Karnieli, Banner, Hoffer, Levy, Soudry, DropCompute: simple and more robust distributed
    synchronous training via compute variance reduction, NeurIPS 2023, arXiv:2306.10598, algorithms 1 and 2.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from lightning_eff.checks import checked
from lightning_eff.errors import NoEffectWarning
from lightning_eff.functional.stragglers.model import best_threshold
from lightning_eff.functional.stragglers.simulated import Delay, parse_delay
from lightning_eff.functional.stragglers.threshold import Normalize, gradient_factor
from lightning_eff.functional.stragglers.timings import append_timings
from lightning_eff.integration.loop import compare_logs_between_ranks, look_for_sigterm_once_per_window
from lightning_eff.integration.rank_faults import Meetings
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.runtime.figures import is_logged, log_figures
from lightning_eff.runtime.finite import FIND_OPERATION, stop_if_broken
from lightning_eff.runtime.gradient_sum import GradientSum
from lightning_eff.runtime.patches import Undo
from lightning_eff.strategies.dropcompute import compatibility as refusals
from lightning_eff.strategies.dropcompute.compensation import Compensation
from lightning_eff.strategies.dropcompute.window import Clock, HeldClock, Measured, Tally, Window
from lightning_eff.strategies.options import DROPCOMPUTE, UNSETTLED_STEPS
from lightning_eff.strategies.step_guard import CollectiveGuard, StepGuard

KEY = "DropComputeStrategy"


class DropComputeMixin(HeldClock, CollectiveGuard, StepGuard, Meetings):
    """Synchronous data parallelism with bounded compute time: late ranks drop micro-batches, nobody waits for them.

    Every rank computes the micro-batches of an optimizer step (``accumulate_grad_batches`` of them) until its compute
    threshold has passed; a micro-batch once begun is finished. Then all ranks sum their gradients in one explicit
    all-reduce, which carries how many micro-batches each has computed, and divide by the number of all. It is
    DistributedDataParallel's mean over what was computed; with nothing dropped it is its result.

    Args:
        threshold: seconds; ``inf`` never drops; ``"auto"`` measures ``warmup_steps`` steps without dropping, then takes
            the threshold with the most computed samples per second in the measured times.
        warmup_steps: steps ``"auto"`` measures, 6 to 10,000; the first few are not counted.
        max_drop_rate: what ``"auto"`` may drop at most, as a share of the measured micro-batches. The paper saw no loss
            in accuracy up to about 0.1.
        normalize: ``"computed"`` divides by the micro-batches that were computed, ``"maximum"`` by all of them, so that
            gradients shrink with the drop rate, as in the authors' code.
        min_micro_batches: computed by every rank in every step however late it is, 1 or more.
        include_data_time: count waiting for data as compute time.
        compensate: ``"extra_steps"`` adds a step to ``max_steps`` for every one dropped in sum; OneCycleLR ends before.
        re_estimate_every_n_steps: measure again every n steps, for a fifth of ``warmup_steps``; 0 never.
        delay: simulated stragglers: ``"lognormal"`` (the paper's), ``"stall"``, ``"stall:p=0.1,factor=3"``, the path of
            recorded timings, or a :class:`~lightning_eff.functional.Delay`.
        record_timings: path of a CSV file for the micro-batch times of every step in which nothing was dropped, for
            ``python -m lightning_eff plan dropcompute``.
        on_nonfinite: ``"raise"`` on every rank before a NaN or Inf gradient reaches a parameter, or ``"warn"``. With
            fp16's loss scaler, which skips such steps, nothing is checked.
        process_group_backend: ``"nccl"`` or ``"gloo"``; default: by device.
        timeout_s: seconds, 0.001 to 1e9, after which a collective that a rank does not join fails on the others, and
            names it (gloo); also how long ranks wait for each other at the start.

    Raises:
        ConfigurationError: an option is outside its range.
        RankLostError: another rank has raised, ended or hangs, wherever ranks meet.
        UnsupportedCombinationError: SyncBatchNorm, manual optimization, or a collective inside ``training_step``: other
            ranks may have dropped the micro-batch that would answer.

    State: ``threshold_s``, ``measured`` (it is what ``"auto"`` has measured, and is kept), ``steps``, ``computed``,
        ``dropped`` under ``DropComputeStrategy`` in the checkpoint.
    Randomness: simulated delays hash (seed, step, rank, micro-batch).
    """

    info: MethodInfo = METHODS["dropcompute"]

    def __init__(
        self,
        *,
        threshold: Literal["auto"] | float = "auto",
        warmup_steps: int = 50,
        max_drop_rate: float = 0.1,
        normalize: Normalize = "computed",
        min_micro_batches: int = 1,
        include_data_time: bool = False,
        compensate: Literal["extra_steps"] | None = None,
        re_estimate_every_n_steps: int = 0,
        delay: str | Delay | None = None,
        record_timings: str | None = None,
        on_nonfinite: Literal["raise", "warn"] = "raise",
        process_group_backend: str | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        options = checked(DROPCOMPUTE, locals())
        wait = timedelta(seconds=options["timeout_s"])
        super().__init__(process_group_backend=process_group_backend, timeout=wait)  # type: ignore[call-arg]
        self.threshold: Literal["auto"] | float = options["threshold"]
        self.warmup_steps: int = options["warmup_steps"]
        self.max_drop_rate: float = options["max_drop_rate"]
        self.normalize: Normalize = options["normalize"]
        self.min_micro_batches: int = options["min_micro_batches"]
        self.include_data_time: bool = options["include_data_time"]
        self.compensate: Literal["extra_steps"] | None = options["compensate"]
        self.re_estimate_every_n_steps: int = options["re_estimate_every_n_steps"]
        self.on_nonfinite: Literal["raise", "warn"] = options["on_nonfinite"]
        self.delay: Delay | None = parse_delay(delay) if isinstance(delay, str) else options["delay"]
        self.record_timings: str | None = options["record_timings"]
        self._trainer: Any = None
        self._undo: list[Undo] = []
        self._sum: GradientSum | None = None
        self._clock, self._window = Clock(torch.device("cpu")), Window()
        self._total = Tally()
        self._compensation = Compensation()
        self._trained: tuple[Any, Any] = (None, None)
        self._begin(0)

    # ------------------------------------------------------------------------------------------ set up

    def setup(self, trainer: Any) -> None:
        """Set up as DDP does, without its wrapper; refuse what would wait for a rank inside a step."""
        self._trainer, fits = trainer, trainer.state.fn == "fit"
        if fits:
            refusals.refuse(trainer, getattr(self, "_layer_sync", None), self.compensate, self.record_timings)
        super().setup(trainer)  # type: ignore[misc]
        self._clock = Clock(self.root_device)  # type: ignore[attr-defined]
        self._window = Window(started=self._clock.now())
        if not fits:
            return
        refusals.refuse_optimizers(self.optimizers)  # type: ignore[attr-defined]
        of = (trainer, trainer.lightning_module)
        if trainer.global_step == 0 or any(a is not b for a, b in zip(of, self._trained, strict=True)):
            self._compensation.forget(trainer)
            self._total, self._steps = Tally(), 0
        self._trained = of
        self._compensation.go_on(trainer, self._total.dropped)
        self._begin(self._steps)
        self._undo += [
            look_for_sigterm_once_per_window(trainer),
            compare_logs_between_ranks(trainer, self.info.name),
            *self._refuse_other_steps(),
        ]

    def _begin(self, steps: int) -> None:
        """What belongs to a run begins anew: of other layers, batches or machines nothing measured before is true."""
        automatic = self.threshold == "auto"
        self.threshold_s = math.inf if automatic else float(self.threshold)
        self.metrics: dict[str, float] = {}
        self._steps, self._unsettled_until = steps, steps + UNSETTLED_STEPS
        self._measuring_until = steps + self.warmup_steps if automatic else 0
        self._measured, self._measured_for = Measured(), 0
        self._has_measured = False  # whether threshold_s comes from a measurement that has ended
        self._run, self._recent = Tally(), Tally()

    def configure_ddp(self) -> None:
        """Give every rank the weights of rank 0. The wrapper would reduce in a backward that a rank may drop."""
        from torch.distributed.utils import _sync_module_states

        model: nn.Module = self.model  # type: ignore[attr-defined]
        group: Any = dist.group.WORLD
        _sync_module_states(model, group, 250 << 20, src=0, params_and_buffers_to_ignore=[])

    # ------------------------------------------------------------------------------------------ a micro-batch

    @property
    def micro_batches(self) -> int:
        """M, micro-batches of a full step."""
        return int(self._trainer.accumulate_grad_batches)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the micro-batch, or return a loss of zero if the threshold has passed."""
        now = self._clock.now()
        place = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        if place % self.micro_batches == 0 and self._window.offered:  # the epoch before was cut short inside a window
            self._window = Window(started=now)
        window = self._window
        tau = math.inf if self._steps < self._measuring_until else self.threshold_s
        self._dropping = not window.goes_on(
            now, tau=tau, least=self.min_micro_batches, with_data=self.include_data_time
        )
        window.offered += 1
        if self._dropping:
            return torch.zeros((), device=self.root_device, requires_grad=True, dtype=torch.float32)  # type: ignore[attr-defined]
        self._began = now
        with self._no_collectives():
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run backward, with its hooks, for a micro-batch that was computed."""
        if self._dropping:
            return closure_loss.detach()
        result: Tensor = super().backward(closure_loss, optimizer, *args, **kwargs)  # type: ignore[misc]
        window, last = self._window, self._window.offered == self.micro_batches
        window.losses.append(closure_loss.detach())
        took = self._clock.now(wait_for_all=last) - self._began
        if self.delay is not None:
            rank: int = self.global_rank  # type: ignore[attr-defined]
            time.sleep(self.delay.extra_s(self._steps, rank, len(window.times), took))
            took = self._clock.now() - self._began
        window.times.append(took)
        return result

    # ------------------------------------------------------------------------------------------ a step

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Sum the gradients after the last micro-batch, before hooks, unscaling and clipping; then step."""

        def summed() -> Any:
            result = closure()
            self._sum_gradients()
            return result

        with self._own_step():
            output = super().optimizer_step(optimizer, summed, model, **kwargs)  # type: ignore[misc]
        self._end_step()
        return output

    def _sum_gradients(self) -> None:
        world, rank, window = dist.get_world_size(), dist.get_rank(), self._window
        parameters = [p for p in self.lightning_module.parameters() if p.requires_grad]  # type: ignore[attr-defined]
        if self._sum is None or not self._sum.fits(parameters):
            self._sum = GradientSum(parameters, 2 * world)
        numbers = [0.0] * (2 * world)
        numbers[rank], numbers[world + rank] = len(window.times), sum(window.times)
        sums = self._sum(numbers, within=self._meeting(f"optimizer step {self._steps}"))
        self._counts, self._elapsed_s = sums[:world], sums[world:]
        self._check_finite()
        factor = 1.0
        if sum(self._counts) < window.offered * world:
            counts = torch.tensor(self._counts, dtype=torch.int64, device="cpu")
            factor = world * gradient_factor(counts, self.micro_batches, self.normalize, window=window.offered).item()
        self._sum.write_back(factor)

    def _check_finite(self) -> None:
        """Stop a non-finite gradient before it reaches a parameter; the sums are the same on every rank."""
        if self._sum is None or getattr(self.precision_plugin, "scaler", None) is not None:  # type: ignore[attr-defined]
            return
        broken = {id(p) for p in self._sum.broken()}
        if not broken:
            return
        names = [name for name, p in self.lightning_module.named_parameters() if id(p) in broken]  # type: ignore[attr-defined]
        ranks = "; ".join(self._sum.breakers(self._window.losses))
        where = f"at optimizer step {self._steps} (from {ranks})"
        stop_if_broken(self.info.name, names, where=where, on_nonfinite=self.on_nonfinite, advice=FIND_OPERATION)

    def _end_step(self) -> None:
        window, now = self._window, self._clock.now(wait_for_all=True)
        wall_s = now - window.started
        for tally in (self._total, self._run, self._recent):
            tally.add(self._counts, self._elapsed_s, window.offered, wall_s)
        self._sync_buffers()
        self._steps += 1
        if self.micro_batches != self._measured_for:
            self._measure_anew()
        whole = window.offered == self.micro_batches and sum(self._counts) == window.offered * len(self._counts)
        if whole and self._steps > self._unsettled_until and (self._measuring() or self.record_timings):
            self._measured.rows.append([*window.times, wall_s])
        self._estimate()
        self._compensate()
        if is_logged(self._trainer, self._steps):
            self._publish()
        self._window = Window(started=self._clock.now())

    def _sync_buffers(self) -> None:
        """Running statistics are those of rank 0 at the beginning of every step, as in DistributedDataParallel."""
        if buffers := [buffer.detach() for buffer in self.lightning_module.buffers()]:  # type: ignore[attr-defined]
            with self._meeting(f"the end of optimizer step {self._steps}"):
                dist._broadcast_coalesced(dist.distributed_c10d._get_default_group(), buffers, 250 << 20, 0)

    def _compensate(self) -> None:
        if self.compensate and not refusals.searches(self._trainer):
            self._compensation.lengthen(self._trainer, self._total.dropped, self.micro_batches * dist.get_world_size())

    # ------------------------------------------------------------------------------------------ the threshold

    def _measuring(self) -> bool:
        return self._steps <= self._measuring_until

    def _measure_anew(self) -> None:
        """``accumulate_grad_batches`` has changed: what was measured is of another step."""
        if self._measured_for and self.threshold == "auto":
            self._measuring_until, self._has_measured = self._steps + self.warmup_steps, False
        self._measured, self._measured_for = Measured(), self.micro_batches

    def _estimate(self) -> None:
        """At the end of a measurement, agree on a threshold; where asked, begin another."""
        every = self.re_estimate_every_n_steps
        measured = self._steps == self._measuring_until
        if measured and self._measured.rows:
            table, other = self._measured.gather()
            self._record(table, other)
            tau = best_threshold(
                table, other, min_micro_batches=self.min_micro_batches, max_drop_rate=self.max_drop_rate
            )
            # Equal tables give equal thresholds; different processors might round differently.
            self.threshold_s, self._has_measured = float(self.broadcast(tau)), True
        elif measured and math.isinf(self.threshold_s):
            warnings.warn(
                f"dropcompute has measured nothing and drops nothing: none of {self.warmup_steps} steps was a full one "
                f"of accumulate_grad_batches={self.micro_batches} micro-batches. Use fewer, or threshold=seconds.",
                NoEffectWarning,
                stacklevel=2,
            )
        elif self.record_timings and len(self._measured.rows) == self.warmup_steps:
            self._record(*self._measured.gather())
        elif every and self.threshold == "auto" and self._steps % every == 0:
            self._measuring_until = self._steps + max(self.warmup_steps // 5, 1)

    def _record(self, table: Tensor, other: Tensor) -> None:
        if self.record_timings and dist.get_rank() == 0:
            append_timings(self.record_timings, table, other, first_step=self._steps - len(table))

    # ------------------------------------------------------------------------------------------ reports and state

    def _publish(self) -> None:
        recent, self._recent = self._recent, Tally()
        prefix = f"eff/{self.info.name}/"
        self.metrics = {
            prefix + "drop_rate": recent.drop_rate,
            prefix + "step_time_s": recent.seconds / recent.steps,
            prefix + "speedup_estimate": recent.speedup,
        }
        if math.isfinite(self.threshold_s):
            self.metrics[prefix + "threshold_s"] = self.threshold_s
        log_figures(self._trainer, self.metrics)

    def teardown(self) -> None:
        """Say what dropping was worth, and let the process group go as DDP does."""
        run = self._run
        if run.steps and getattr(self, "global_rank", 0) == 0:
            Console(width=200).print(
                f"{self.info.name}: {run.steps} steps in {run.seconds:.1f} s, {run.drop_rate:.1%} of the micro-batches "
                f"dropped (threshold {self.threshold_s:.3g} s). Waiting for every rank would have taken an estimated "
                f"{run.waited_s:.1f} s: {run.speedup:.2f}x the computed samples per second.",
                highlight=False,
            )
        self._run, self._recent, self._sum = Tally(), Tally(), None
        super().teardown()  # type: ignore[misc]

    def _restart(self) -> None:
        """What was before a checkpoint is restored, a search for a learning rate for instance, was another run."""
        self._compensation.forget(self._trainer)
        self._window, self._total = Window(started=self._clock.now()), Tally()
        self._begin(0)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save, with the threshold and the tally."""
        checkpoint[KEY] = {
            "threshold_s": self.threshold_s,
            "measured": self._has_measured,
            "steps": self._steps,
            "computed": self._total.computed,
            "dropped": self._total.dropped,
        }
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Restore the optimizers, the threshold and the tally; with a damaged state a CheckpointError, and nothing."""
        state = self.info.read_state(checkpoint[KEY]) if KEY in checkpoint else None
        super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]
        self._restart()
        if state is not None:
            self._steps, self._unsettled_until = state["steps"], state["steps"] + UNSETTLED_STEPS
            self._total.computed, self._total.dropped = state["computed"], state["dropped"]
            self._compensate()
            if self.threshold == "auto":
                saved, measured = state["threshold_s"], state["measured"]
                # Older checkpoints do not say; in them inf is taken for a measurement that had not ended.
                self._has_measured = math.isfinite(saved) if measured is None else measured
                self.threshold_s = saved if self._has_measured else math.inf
                self._measuring_until = 0 if self._has_measured else self._steps + self.warmup_steps
