"""``strategy="pipelined_bp"``: the model over several processes, with no bubble and an unchanged ``training_step``.

References:
    Kosson, Chiley, Venigalla, Hestness, Köster, Pipelined backpropagation at scale: training large models without
    batches, MLSys 2021, arXiv:2003.11666. Definitions of spike compensation and weight prediction from memory and
    verified against each other (:mod:`lightning_eff.functional.staleness.mitigation`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from lightning_eff.checks import checked
from lightning_eff.errors import EffWarning
from lightning_eff.functional.staleness.schedule import stage_delay
from lightning_eff.integration.loop import look_for_sigterm_once_per_window
from lightning_eff.integration.rank_faults import Meetings
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.runtime.figures import is_logged, log_figures
from lightning_eff.runtime.patches import Undo, replaced
from lightning_eff.runtime.rng import Randomness, drawn_seed, same_on_all_ranks
from lightning_eff.strategies.options import PIPELINED_BP
from lightning_eff.strategies.pipelined_bp import compatibility as refusals
from lightning_eff.strategies.pipelined_bp import consolidate as gather
from lightning_eff.strategies.pipelined_bp import hooks
from lightning_eff.strategies.pipelined_bp.engine import Runner
from lightning_eff.strategies.pipelined_bp.mitigation import fitting, parse_mitigation
from lightning_eff.strategies.pipelined_bp.one_replica import OneReplica
from lightning_eff.strategies.pipelined_bp.partition import Cut, cut, cut_table
from lightning_eff.strategies.pipelined_bp.profiling import Look, curvature_at, look_at
from lightning_eff.strategies.pipelined_bp.report import tell
from lightning_eff.strategies.pipelined_bp.resume import go_on
from lightning_eff.strategies.pipelined_bp.stack import find_stack
from lightning_eff.strategies.pipelined_bp.weights import Stage, Weights
from lightning_eff.strategies.step_guard import StepGuard

KEY = "PipelinedBPStrategy"


class PipelinedBPMixin(OneReplica, StepGuard, Meetings):
    """Pipeline parallelism without bubble: every stage updates as soon as a gradient arrives, and allows for the delay.

    The layers of one stack are cut into stages, one or more per process. Stage s of S runs sample i forward with
    weights that lack the last D_s = ``in_flight`` (S - 1 - s) updates, and mitigates that. With one process the same
    delays are computed in it, to the same bits.

    Args:
        module: name of the module that holds the layers: an ``nn.Sequential``, an ``nn.ModuleList`` that is walked in
            order, or one with a method ``pipeline_stages()``; None finds the only one.
        stages: number of stages, balanced by measured times; ``"layers"`` for one per layer; the names of the layers at
            which stages after the first begin; None or ``"auto"`` for as many as there are processes.
        mitigation: ``"lwp+sc"`` (weight prediction and spike compensation, the paper's), ``"lwp"``, ``"lwp_w"``,
            ``"sc"``, ``"stash"``, ``"spectrain"``, ``"shrink"``, ``"none"``, or some joined with ``+``.
        horizon: multiple of a stage's delay that prediction and compensation are for, 0 to 1000; default 1.
        micro_batch_size: samples per update; splits the training loader's batches. None keeps them.
        stash: backward with the weights of the forward pass (a copy of them for every sample in flight).
        in_flight: samples a stage runs ahead of the next by, 1 to 64; 2 is the paper's schedule, 1 halves delays and
            activations but waits for every message.
        shrink_factor: gamma of ``"shrink"``, by which gradients shrink for every update they are late.
        curvature: largest eigenvalue of the loss's Hessian, for a warning if training cannot be stable; ``"measure"``
            takes each stage's from the first batch (some 40 passes a stage).
        on_nonfinite: ``"raise"`` before a NaN or Inf gradient reaches a parameter, or ``"warn"``.
        schedule_picture: save a picture of the schedule beside the logs, or in ``default_root_dir``.
        process_group_backend: ``"nccl"`` or ``"gloo"``; default: by device.
        timeout_s: seconds, 0.001 to 1e9, after which a message that does not come, or a rank at the start, is an error.

    Raises:
        ConfigurationError: an option is outside its range, or the model has no such stack.
        UnsupportedCombinationError: manual optimization, an fp16 loss scaler, gradient accumulation, layers that run
            twice, or a parameter that two stages would share.

    State: ``samples``, ``seed``, ``starts`` and ``stages`` (kept weight versions) under ``PipelinedBPStrategy``.
    Randomness: every (micro-batch, stage) has its own stream, hashed from ``torch.initial_seed()``.
    """

    info: MethodInfo = METHODS["pipelined_bp"]

    def __init__(
        self,
        *,
        module: str | None = None,
        stages: int | str | Sequence[str] | None = None,
        mitigation: str = "lwp+sc",
        horizon: float | None = None,
        micro_batch_size: int | None = None,
        stash: bool = False,
        in_flight: int = 2,
        shrink_factor: float = 0.9,
        curvature: float | Literal["measure"] | None = None,
        on_nonfinite: Literal["raise", "warn"] = "raise",
        schedule_picture: bool = True,
        process_group_backend: str | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        given = checked(PIPELINED_BP, locals())
        self._wait = timedelta(seconds=given["timeout_s"])
        super().__init__(process_group_backend=process_group_backend, timeout=self._wait)  # type: ignore[call-arg]
        self.mitigation = parse_mitigation(
            given["mitigation"], horizon=given["horizon"], gamma=given["shrink_factor"], stash=given["stash"]
        )
        self.module, self.stages, self.in_flight = given["module"], given["stages"], given["in_flight"]
        self.micro_batch_size, self.curvature = given["micro_batch_size"], given["curvature"]
        self.on_nonfinite, self.schedule_picture = given["on_nonfinite"], given["schedule_picture"]
        self.metrics: dict[str, float] = {}
        self._trainer: Any = None
        self._undo: list[Undo] = []
        self._runner: Runner | None = None
        self._gathered: gather.Gathered | None = None
        self._loaded: dict[str, Any] | None = None
        self._draining = False
        self._model_of_run: Any = None
        self._fingerprint = 0

    # ------------------------------------------------------------------------------------------ set up

    def _weights(self) -> Weights | None:
        return None if self._runner is None else self._runner.weights

    def setup(self, trainer: Any) -> None:
        """Set up as DDP does, without its wrapper; refuse what a pipeline cannot do."""
        self._trainer, fits = trainer, trainer.state.fn == "fit"
        if fits or self._model_of_run is not trainer.lightning_module:
            self._begin_run()
        if fits:
            self._loaded, self._model_of_run = None, trainer.lightning_module
            refusals.refuse(trainer, self.num_stages, self.positions)
            self._layer_sync = None  # of SyncBatchNorm: with one replica its batch is the whole batch
        super().setup(trainer)  # type: ignore[misc]
        # Lightning takes every DDPStrategy for one that shares samples out, and would put its own sampler in.
        self._undo += [replaced(trainer._accelerator_connector, "use_distributed_sampler", False)]
        if fits and self._pipelines:
            model = self.lightning_module  # type: ignore[attr-defined]
            refusals.refuse_optimizers(self.optimizers)  # type: ignore[attr-defined]
            refusals.refuse_memories(self.precision_plugin, self.positions)  # type: ignore[attr-defined]
            self._scheduler_steps = hooks.SchedulerSteps(model, self._weights)
            self._undo += [
                look_for_sigterm_once_per_window(trainer),
                self._scheduler_steps.undo,
                hooks.keep_metrics_local(model),
                hooks.at_epoch_end(trainer, self._epoch_ends),
                hooks.before_validation(trainer, self._drain),
                hooks.clip_by_stage(self.precision_plugin, self._weights),  # type: ignore[attr-defined]
                *self._refuse_other_steps(),
            ]
            if self.positions > 1:
                same_on_all_ranks()

    def _begin_run(self) -> None:
        """Forget the run before: what follows has other samples, weights and groups of the optimizer."""
        if self._gathered is not None:
            self._gathered.give_back()
        if self._runner is not None:
            self._runner.abandon()
        self._runner, self._gathered, self.metrics, self._draining = None, None, {}, False

    def configure_ddp(self) -> None:
        """Give every rank the weights of rank 0."""
        gather.same_weights(self.model)  # type: ignore[attr-defined]

    def process_dataloader(self, dataloader: Any) -> Any:
        """Split the batches of the training loader, if asked for."""
        if self.micro_batch_size and self._trainer is not None and self._trainer.training:
            dataloader = hooks.with_batch_size(dataloader, self.micro_batch_size)
        self._undo.append(hooks.seed_workers_alike(dataloader, type(self._trainer).__module__))
        return super().process_dataloader(dataloader)  # type: ignore[misc]

    def _begin(self, step: Callable[[], Any]) -> Runner:
        """With the first batch: look at the model, cut it, keep what is this rank's."""
        model, optimizer = self.lightning_module, self.optimizers[0]  # type: ignore[attr-defined]
        device: torch.device = self.root_device  # type: ignore[attr-defined]
        mitigation, said = fitting(self.mitigation, optimizer)
        loaded, self._loaded = self._loaded, None
        stages = self.num_stages

        named = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def found() -> tuple[str, Look, Cut, int, list[Any]]:
            stack = find_stack(model, self.module, stages=stages if isinstance(stages, int) else 2)
            seen = [look_at(model, stack, step, device) for _ in range(2)][-1]  # the first is slow, and times are used
            wanted = stages
            if loaded is not None and loaded["layers"] == list(stack.names) and len(loaded["starts"]) == stages:
                wanted = loaded["starts"]  # measured times differ from run to run
            where = cut(model, stack, seen, wanted, self.positions)
            parts = [[p for n, p in named.items() if where.owners[n] == s] for s in range(where.stages)]
            curved = [
                curvature_at(model, step, device, p) if self.curvature == "measure" else self.curvature for p in parts
            ]
            return stack.name, seen, where, drawn_seed(self._trainer.global_step), curved

        first = self._meeting("the first micro-batch")
        with hooks.precision_unchanged(self.precision_plugin):  # type: ignore[attr-defined]
            name, seen, where, seed, curved = gather.told_by_rank_0(found, within=first)
        stack = find_stack(model, name if self.module is None and name else self.module, stages=where.stages)
        position = self.positions - 1 - int(self.global_rank)  # type: ignore[attr-defined]
        mine = [
            Stage(s, where.stages, self.in_flight, [p for n, p in named.items() if where.owners[n] == s])
            for s in where.stages_of(position)
        ]
        if position == self.positions - 1:
            delays = [stage_delay(s, where.stages, in_flight=self.in_flight) for s in range(where.stages)]
            Console(width=140).print(cut_table(stack, seen, where, named, delays))
            refusals.warn_if_unstable(optimizer, mitigation, delays, curved)
            if said:
                warnings.warn(f"pipelined_bp: {said}", EffWarning, stacklevel=2)
        weights = Weights(mine, mitigation, optimizer)
        if loaded is not None:
            seed = loaded["seed"]
            go_on(weights, loaded, [stack.names[i] for i in where.starts], self.in_flight)
        self._gathered = gather.Gathered(model, optimizer, where, position)
        self._undo.append(self._gathered.give_back)
        streams = Randomness(seed, device)
        roll: Any = self._roll_call
        return Runner(stack, seen, where, weights, streams, timeout=self._wait, roll=roll)

    # ------------------------------------------------------------------------------------------ a micro-batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note what the batch looks like: first and last stage have to see the same."""
        if self.positions > 1:
            self._fingerprint = hooks.fingerprint(batch)
        super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the micro-batch forward: the whole model, or this rank's stages of it."""
        step = functools.partial(super().training_step, *args, **kwargs)  # type: ignore[misc]
        if not self._pipelines:
            return step()
        if self._runner is None:
            self._runner = self._begin(step)
            self._trained = refusals.Trained(self.lightning_module, self.optimizers[0])  # type: ignore[attr-defined]
        self._trained.check()
        out = self._runner.forward(step, self._in_step_context, self._fingerprint)
        if self._runner.is_last:
            return out
        return torch.zeros((), device=self.root_device, requires_grad=True, dtype=torch.float32)  # type: ignore[attr-defined]

    def _in_step_context(self, what: Callable[[], Any]) -> None:
        with self.precision_plugin.train_step_context():  # type: ignore[attr-defined]
            what()

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the loss backward, or the oldest sample whose gradient comes from the next stage."""
        runner = self._runner
        if runner is None or runner.is_last:
            of_base = super().backward  # type: ignore[misc]
            backward = functools.partial(of_base, closure_loss, optimizer, *args, **kwargs)
            result: Tensor = backward() if runner is None else runner.backward_of_loss(backward)
            return result
        if runner.gradient_is_due:
            runner.backward_of_oldest()
            self.precision_plugin.post_backward(closure_loss, self.lightning_module)  # type: ignore[attr-defined]
        return closure_loss.detach()

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Update this rank's stages with the gradient that has come, if one has."""
        if not self._pipelines:
            return super().optimizer_step(optimizer, closure, model, **kwargs)  # type: ignore[misc]
        with self._own_step(), hooks.own_step(optimizer, self._update):
            output = super().optimizer_step(optimizer, closure, model, **kwargs)  # type: ignore[misc]
        self._scheduler_steps.run_due()
        if not self._draining:
            self._publish()
        return output

    def _update(self, step: Callable[[], Any]) -> None:
        """What the optimizer's step does after forward, backward, hooks and clipping."""
        runner: Any = self._runner
        if runner.is_last and runner.arrived is None:
            runner.no_loss()
        if runner.arrived:
            refusals.check_finite(self.lightning_module, runner.weights, self.on_nonfinite)  # type: ignore[attr-defined]
        runner.update(step)

    # ------------------------------------------------------------------------------------------ where ranks meet

    def _drain(self) -> None:
        """Make every update that is under way. Later forward passes see the versions they would have seen anyway."""
        runner = self._runner
        if runner is None:
            return
        runner.timeline.pause()
        optimizer, model = self.optimizers[0], self.lightning_module  # type: ignore[attr-defined]

        def closure() -> Tensor:
            with torch.enable_grad():
                runner.backward_of_oldest()
            return torch.zeros((), device=runner.device, dtype=torch.float32)

        self._draining = True
        while runner.in_flight:
            optimizer.zero_grad()
            self.optimizer_step(optimizer, closure, model)
        self._draining = False
        runner.timeline.pause()

    def _meet(self) -> None:
        """Drain, and give every rank the whole model."""
        self._drain()
        if self._gathered is not None and self.positions > 1:
            with self._together("bringing the weights together"):
                self._gathered.weights()

    def _epoch_ends(self) -> None:
        self._meet()
        self._share_metrics()

    def _share_metrics(self) -> None:
        if self.positions > 1:
            with self._together("sharing metrics"):
                gather.metrics_of_rank_0(self._trainer)

    def _together(self, where: str) -> AbstractContextManager[None]:
        return nullcontext() if self._runner is None else self._runner.together(where)

    def _let_go(self) -> None:
        """Close the connections to the neighbours."""
        if self._runner is not None:
            self._runner.abandon()

    def on_validation_start(self) -> None:
        """Every rank evaluates the whole model."""
        super().on_validation_start()  # type: ignore[misc]
        if self._trainer.state.fn == "fit":
            self._epoch_ends()  # after it, callbacks may decide by a metric of training as well

    def on_train_end(self) -> None:
        """Every rank holds the trained model; what neighbours have asked for in advance is answered."""
        self._meet()
        if (runner := self._runner) is not None:
            runner.close()
            folder = self._trainer.log_dir or self._trainer.default_root_dir  # all ranks together
            with self._together("the end of training"):
                timelines = gather.collected((runner.timeline.spans(), runner.timeline.run))
            if timelines is not None:
                timelines.reverse()  # rank 0 has the last stage
                tell(timelines, runner.weights, folder if self.schedule_picture and self.positions > 1 else None)
        super().on_train_end()  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------ figures and state

    def _publish(self) -> None:
        """Log figures every n steps, and let callbacks on all ranks see the metrics they are about to decide by."""
        trainer, runner = self._trainer, self._runner
        step = trainer.global_step + 1
        if runner is not None and is_logged(trainer, step):
            self.metrics = runner.record()
            log_figures(trainer, self.metrics)
        if hooks.decides_in_step(trainer, step):
            self._share_metrics()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole model's, every update made."""
        refusals.refuse_after_error(self._after_error)
        self._meet()
        return super().lightning_module_state_dict()  # type: ignore[misc,no-any-return]

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The whole optimizer's, on rank 0."""
        ours: dict[str, Any] = super().optimizer_state(optimizer)  # type: ignore[misc]
        if self._gathered is None:
            return ours
        with self._together("saving the optimizer's state"):
            return self._gathered.optimizer_state(ours)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save, with the weight versions that later forward passes are to see."""
        if (runner := self._runner) is not None and "optimizer_states" in checkpoint:
            with self._together("saving versions of weights"):
                parts = gather.collected(runner.weights.state())
            checkpoint[KEY] = {
                "samples": runner.weights.samples,
                "seed": runner.randomness.seed,
                "in_flight": self.in_flight,
                "layers": list(runner.stack.names),
                "starts": list(runner.cut.starts),
                "stages": [state for part in parts or [] for state in part],
            }
        elif self._loaded is not None and "optimizer_states" in checkpoint:  # before the first batch of a resumed run
            checkpoint[KEY] = self._loaded
        super().save_checkpoint(checkpoint, filepath, storage_options)  # type: ignore[misc]

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Restore the optimizers; the rest is looked at here, and restored with the first batch."""
        loaded = self.info.read_state(checkpoint[KEY]) if KEY in checkpoint else None
        self._begin_run()  # what there was before, a search for a learning rate, was a run of its own
        super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]
        self._loaded = loaded
