"""``strategy="dropcompute"``: data parallelism that does not wait for stragglers.

References:
    Giladi, Gottlieb, Shkolnik, Karnieli, Banner, Hoffer, Levy, Soudry, DropCompute: simple and more robust distributed
    synchronous training via compute variance reduction, NeurIPS 2023, arXiv:2306.10598, algorithms 1 and 2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eff.checks import checked
from lightning_eff.functional.stragglers.simulated import Delay, parse_delay
from lightning_eff.functional.stragglers.threshold import MAX_DROP_RATE, Normalize, gradient_factor
from lightning_eff.integration.logged import compare_logs_between_ranks
from lightning_eff.integration.loop import look_for_sigterm_once_per_window, micro_batch_of_epoch
from lightning_eff.integration.rank_faults import RankFaults
from lightning_eff.integration.trainer_parts import is_searching_learning_rate, layer_sync_of
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.runtime.figures import console, is_logged, log_figures
from lightning_eff.runtime.finite import FIND_OPERATION, stop_if_broken
from lightning_eff.runtime.gradient_sum import GradientSum
from lightning_eff.runtime.patches import Undo
from lightning_eff.runtime.ranks import broadcast_tensors, broadcast_weights
from lightning_eff.strategies.dropcompute import compatibility
from lightning_eff.strategies.dropcompute.clock import Clock, HeldClock
from lightning_eff.strategies.dropcompute.compensation import Compensation
from lightning_eff.strategies.dropcompute.no_collectives import NoCollectives
from lightning_eff.strategies.dropcompute.options import OPTIONS
from lightning_eff.strategies.dropcompute.threshold import ThresholdSearch
from lightning_eff.strategies.dropcompute.window import Tallies, Window
from lightning_eff.strategies.step_guard import StepGuard

KEY = "DropComputeStrategy"
"""Key of the strategy's state in a checkpoint."""


class DropComputeMixin(HeldClock, NoCollectives, StepGuard, RankFaults):
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
        max_drop_rate: float = MAX_DROP_RATE,
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
        options = checked(OPTIONS, locals())
        wait = timedelta(seconds=options["timeout_s"])
        super().__init__(process_group_backend=process_group_backend, timeout=wait)
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
        self._trained: tuple[Any, Any] = (None, None)
        self._undo: list[Undo] = []
        self._sum: GradientSum | None = None
        self._clock = Clock(torch.device("cpu"))
        self._window = Window()
        self._tallies = Tallies()
        self._compensation = Compensation()
        self._search = ThresholdSearch()
        self._begin(0)

    # ------------------------------------------------------------------------------------------ set up

    @property
    def threshold_s(self) -> float:
        """Compute threshold tau, seconds; inf as long as none has been found."""
        return self._search.threshold_s

    @threshold_s.setter
    def threshold_s(self, seconds: float) -> None:
        self._search.threshold_s = seconds

    def setup(self, trainer: Any) -> None:
        """Set up as DDP does, without its wrapper; refuse what would wait for a rank inside a step."""
        self._trainer = trainer
        fits = trainer.state.fn == "fit"
        if fits:
            compatibility.refuse_trainer(
                trainer,
                layer_sync=layer_sync_of(self),
                compensate=self.compensate,
                record_timings=self.record_timings,
            )
        super().setup(trainer)
        self._clock = Clock(self.root_device)
        self._window = Window(started=self._clock.now())
        if fits:
            compatibility.refuse_optimizers(self.optimizers)
            self._begin_fit(trainer)

    def _begin_fit(self, trainer: Any) -> None:
        """Begin a run, which goes on with the last one's counts if Trainer and model are the same."""
        last_trainer, last_model = self._trained
        is_another = trainer is not last_trainer or trainer.lightning_module is not last_model
        if trainer.global_step == 0 or is_another:
            self._compensation.forget(trainer)
            self._tallies.forget()
            self._steps = 0
        self._trained = (trainer, trainer.lightning_module)
        self._compensation.begin_run(trainer, self._tallies.total.dropped)
        self._begin(self._steps)
        self._undo += [
            look_for_sigterm_once_per_window(trainer),
            compare_logs_between_ranks(trainer, self.info.name),
            *self._refuse_other_steps(),
        ]

    def _begin(self, steps: int) -> None:
        """Begin anew what belongs to a run, after ``steps`` optimizer steps."""
        self._steps = steps
        self._search.begin(steps, self)
        self._tallies.begin_run()
        self.metrics: dict[str, float] = {}

    def configure_ddp(self) -> None:
        """Give every rank the weights of rank 0. The wrapper would reduce in a backward that a rank may drop."""
        model: Any = self.model
        broadcast_weights(model)

    # ------------------------------------------------------------------------------------------ a micro-batch

    @property
    def micro_batches(self) -> int:
        """M, micro-batches of a full step."""
        return int(self._trainer.accumulate_grad_batches)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the micro-batch, or return a loss of zero if the threshold has passed."""
        now = self._clock.now()
        begins_window = micro_batch_of_epoch(self._trainer) % self.micro_batches == 0
        if begins_window and self._window.offered:  # the epoch before was cut short inside a window
            self._window = Window(started=now)
        self._dropping = not self._window.goes_on(
            now,
            tau=self._search.tau(self._steps),
            least=self.min_micro_batches,
            with_data=self.include_data_time,
        )
        self._window.offered += 1
        if self._dropping:
            return torch.zeros((), device=self.root_device, requires_grad=True, dtype=torch.float32)
        self._began = now
        with self._no_collectives():
            return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run backward, with its hooks, for a micro-batch that was computed."""
        if self._dropping:
            return closure_loss.detach()
        result = super().backward(closure_loss, optimizer, *args, **kwargs)
        window = self._window
        window.losses.append(closure_loss.detach())
        took = self._clock.now(wait_for_all=window.offered == self.micro_batches) - self._began
        if self.delay is not None:
            time.sleep(self.delay.extra_s(self._steps, self.global_rank, len(window.times), took))
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
            output = super().optimizer_step(optimizer, summed, model, **kwargs)
        self._end_step()
        return output

    def _sum_gradients(self) -> None:
        """Sum gradients, and with them every rank's micro-batches k_n and compute time T_n, in one all-reduce."""
        world, rank, window = dist.get_world_size(), dist.get_rank(), self._window
        model: Any = self.lightning_module
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self._sum is None or not self._sum.fits(parameters):
            self._sum = GradientSum(parameters, 2 * world)
        numbers = [0.0] * (2 * world)
        numbers[rank] = len(window.times)
        numbers[world + rank] = sum(window.times)
        sums = self._sum(numbers, within=self.naming_lost_ranks(f"optimizer step {self._steps}"))
        self._counts = sums[:world]
        self._elapsed_s = sums[world:]
        self._check_finite(self._sum)
        factor = 1.0
        if sum(self._counts) < window.offered * world:
            # The sums are over N already: N W / sum_n k_n ("computed"), or N / N ("maximum").
            counts = torch.tensor(self._counts, dtype=torch.int64, device="cpu")
            factor = world * gradient_factor(counts, self.micro_batches, self.normalize, window=window.offered).item()
        self._sum.write_back(factor)

    def _check_finite(self, summed: GradientSum) -> None:
        """Stop a non-finite gradient before it reaches a parameter; the sums are the same on every rank."""
        if getattr(self.precision_plugin, "scaler", None) is not None:
            return
        broken = {id(p) for p in summed.nonfinite_parameters()}
        if not broken:
            return
        model: Any = self.lightning_module
        names = [name for name, p in model.named_parameters() if id(p) in broken]
        ranks = "; ".join(summed.name_nonfinite_ranks(self._window.losses))
        where = f"at optimizer step {self._steps} (from {ranks})"
        stop_if_broken(self.info.name, names, where=where, on_nonfinite=self.on_nonfinite, advice=FIND_OPERATION)

    def _end_step(self) -> None:
        window, now = self._window, self._clock.now(wait_for_all=True)
        wall_s = now - window.started
        self._tallies.add(self._counts, self._elapsed_s, window.offered, wall_s)
        self._sync_buffers()
        self._steps += 1
        is_full = window.offered == self.micro_batches
        self._search.end_step(
            self._steps,
            self,
            times=window.times,
            wall_s=wall_s,
            micro_batches=self.micro_batches,
            is_whole=is_full and sum(self._counts) == window.offered * len(self._counts),
            broadcast=self.broadcast,
        )
        self._lengthen()
        if is_logged(self._trainer, self._steps):
            self._publish()
        self._window = Window(started=self._clock.now())

    def _sync_buffers(self) -> None:
        """Give every rank the running statistics of rank 0 at the end of a step, as DistributedDataParallel does."""
        model: Any = self.lightning_module
        if buffers := [buffer.detach() for buffer in model.buffers()]:
            with self.naming_lost_ranks(f"the end of optimizer step {self._steps}"):
                broadcast_tensors(buffers)

    def _lengthen(self) -> None:
        """Add steps to ``max_steps`` for what has been dropped, if asked for."""
        if self.compensate and not is_searching_learning_rate(self._trainer):
            per_step = self.micro_batches * dist.get_world_size()
            self._compensation.lengthen(self._trainer, self._tallies.total.dropped, per_step)

    # ------------------------------------------------------------------------------------------ reports and state

    def _publish(self) -> None:
        recent = self._tallies.take_recent()
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
        run = self._tallies.run
        if run.steps and getattr(self, "global_rank", 0) == 0:
            console(200).print(
                f"{self.info.name}: {run.steps} steps in {run.seconds:.1f} s, {run.drop_rate:.1%} of the micro-batches "
                f"dropped (threshold {self.threshold_s:.3g} s). Waiting for every rank would have taken an estimated "
                f"{run.waited_s:.1f} s: {run.speedup:.2f}x the computed samples per second.",
                highlight=False,
            )
        self._tallies.begin_run()
        self._sum = None
        super().teardown()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save, with the threshold and the tally."""
        checkpoint[KEY] = {
            "threshold_s": self.threshold_s,
            "measured": self._search.has_measured,
            "steps": self._steps,
            "computed": self._tallies.total.computed,
            "dropped": self._tallies.total.dropped,
        }
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Restore the optimizers, the threshold and the tally; with a damaged state a CheckpointError, and nothing."""
        state = self.info.read_state(checkpoint[KEY]) if KEY in checkpoint else None
        super().load_optimizer_state_dict(checkpoint)
        # What was before, a search for a learning rate for instance, was another run.
        self._compensation.forget(self._trainer)
        self._window = Window(started=self._clock.now())
        self._tallies.forget()
        self._begin(0)
        if state is None:
            return
        self._steps = state["steps"]
        self._tallies.total.computed = state["computed"]
        self._tallies.total.dropped = state["dropped"]
        self._lengthen()
        self._search.resume(self._steps, self, threshold_s=state["threshold_s"], measured=state["measured"])
