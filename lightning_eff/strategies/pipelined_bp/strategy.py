"""``strategy="pipelined_bp"``: the model over several processes, with no bubble and an unchanged ``training_step``.

References:
    Kosson, Chiley, Venigalla, Hestness, Köster, Pipelined backpropagation at scale: training large models without
    batches, MLSys 2021, arXiv:2003.11666. Definitions of spike compensation and weight prediction from memory and
    verified against each other (:mod:`lightning_eff.functional.staleness.mitigation`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_eff.checks import checked
from lightning_eff.integration import loop
from lightning_eff.integration.logged import broadcast_logged_metrics, keep_metrics_local, reads_metrics_at
from lightning_eff.integration.rank_faults import RankFaults
from lightning_eff.integration.trainer_parts import forget_layer_sync, keep_samplers
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.runtime.figures import is_logged, log_figures
from lightning_eff.runtime.finite import OnNonFinite
from lightning_eff.runtime.patches import Undo
from lightning_eff.runtime.ranks import broadcast_weights, find_on_rank_0, gather_on_rank_0
from lightning_eff.runtime.rng import broadcast_generators, seed_of_run
from lightning_eff.strategies.pipelined_bp import batches, compatibility, hooks
from lightning_eff.strategies.pipelined_bp.assembly import Assembly
from lightning_eff.strategies.pipelined_bp.consolidate import Consolidation
from lightning_eff.strategies.pipelined_bp.engine import Engine
from lightning_eff.strategies.pipelined_bp.gradients import check_gradients
from lightning_eff.strategies.pipelined_bp.mitigation import adapt_to_optimizer, parse_mitigation
from lightning_eff.strategies.pipelined_bp.one_replica import OneReplica
from lightning_eff.strategies.pipelined_bp.options import OPTIONS
from lightning_eff.strategies.pipelined_bp.report import print_verdict
from lightning_eff.strategies.pipelined_bp.trained import TrainedParameters
from lightning_eff.strategies.pipelined_bp.weights import Weights
from lightning_eff.strategies.step_guard import StepGuard

KEY = "PipelinedBPStrategy"
"""Key of the strategy's state in a checkpoint."""


class PipelinedBPMixin(OneReplica, StepGuard, RankFaults):
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
        options = checked(OPTIONS, locals())
        self._message_timeout = timedelta(seconds=options["timeout_s"])
        super().__init__(process_group_backend=process_group_backend, timeout=self._message_timeout)
        self.mitigation = parse_mitigation(
            options["mitigation"], horizon=options["horizon"], gamma=options["shrink_factor"], stash=options["stash"]
        )
        self.module: str | None = options["module"]
        self.stages: int | str | Sequence[str] | None = options["stages"]
        self.in_flight: int = options["in_flight"]
        self.micro_batch_size: int | None = options["micro_batch_size"]
        self.curvature: float | Literal["measure"] | None = options["curvature"]
        self.on_nonfinite: OnNonFinite = options["on_nonfinite"]
        self.schedule_picture: bool = options["schedule_picture"]
        self.metrics: dict[str, float] = {}
        self._trainer: Any = None
        self._model_of_run: Any = None
        self._undo: list[Undo] = []
        self._engine: Engine | None = None
        self._consolidation: Consolidation | None = None
        self._trained: TrainedParameters | None = None
        self._saved: dict[str, Any] | None = None  # the checkpoint's state, until the first batch
        self._draining = False
        self._fingerprint = 0

    # ------------------------------------------------------------------------------------------ set up

    def _weights(self) -> Weights | None:
        return None if self._engine is None else self._engine.weights

    def setup(self, trainer: Any) -> None:
        """Set up as DDP does, without its wrapper; refuse what a pipeline cannot do."""
        self._trainer = trainer
        fits = trainer.state.fn == "fit"
        if fits or self._model_of_run is not trainer.lightning_module:
            self._begin_run()
        if fits:
            self._saved = None
            self._model_of_run = trainer.lightning_module
            compatibility.refuse_trainer(trainer, num_stages=self.num_stages, positions=self.positions)
            forget_layer_sync(self)  # of SyncBatchNorm: with one replica its batch is the whole batch
        super().setup(trainer)
        self._undo.append(keep_samplers(trainer))  # every process has to load the same samples
        if fits and self._pipelines:
            self._prepare_fit(trainer)

    def _prepare_fit(self, trainer: Any) -> None:
        """Refuse what optimizer and precision do not go with, and change what a pipeline needs otherwise."""
        compatibility.refuse_optimizers(self.optimizers)
        compatibility.refuse_predicted_scales(self.precision_plugin, positions=self.positions)
        model: Any = self.lightning_module
        self._scheduler_steps = hooks.SchedulerSteps(model, self._weights)
        self._undo += [
            loop.look_for_sigterm_once_per_window(trainer),
            self._scheduler_steps.install(),
            keep_metrics_local(model),
            loop.call_at_epoch_end(trainer, self._end_epoch),
            loop.call_before_validation(trainer, self._drain),
            hooks.clip_by_stage(self.precision_plugin, self._weights),
            *self._refuse_other_steps(),
        ]
        if self.positions > 1:
            broadcast_generators()

    def _begin_run(self) -> None:
        """Forget the run before: what follows has other samples, weights and groups of the optimizer."""
        if self._consolidation is not None:
            self._consolidation.restore_optimizer()
        if self._engine is not None:
            self._engine.abandon()
        self._engine = None
        self._consolidation = None
        self._trained = None
        self._draining = False
        self.metrics = {}

    def configure_ddp(self) -> None:
        """Give every rank the weights of rank 0."""
        model: Any = self.model
        broadcast_weights(model)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Split the batches of the training loader, if asked for."""
        if self.micro_batch_size and self._trainer is not None and self._trainer.training:
            dataloader = batches.split_batches(dataloader, self.micro_batch_size)
        self._undo.append(batches.seed_workers_alike(dataloader, type(self._trainer).__module__))
        return super().process_dataloader(dataloader)

    def _assemble(self, step: Callable[[], Any]) -> Engine:
        """Profile and cut the model with the first batch, and keep what is this rank's."""
        model: Any = self.lightning_module
        optimizer = self.optimizers[0]
        mitigation, left_out = adapt_to_optimizer(self.mitigation, optimizer)
        assembly = Assembly(
            model=model,
            device=self.root_device,
            module=self.module,
            stages=self.num_stages,
            positions=self.positions,
            position=self.positions - 1 - self.global_rank,
            in_flight=self.in_flight,
            curvature=self.curvature,
            saved=self._saved,
        )
        self._saved = None
        with hooks.precision_unchanged(self.precision_plugin):
            blueprint = find_on_rank_0(
                lambda: assembly.draw_up(step, seed=seed_of_run(self._trainer.global_step)),
                within=self.naming_lost_ranks("the first micro-batch"),
            )
        stack = assembly.find_stack(blueprint)
        assembly.announce(blueprint, stack, optimizer=optimizer, mitigation=mitigation, left_out=left_out)
        weights = assembly.make_weights(blueprint, stack, optimizer=optimizer, mitigation=mitigation)
        self._consolidation = Consolidation(model, optimizer, blueprint.partition, position=assembly.position)
        self._undo.append(self._consolidation.restore_optimizer)
        self._consolidation.keep_own_parameters()
        roll_call: Any = self.roll_call
        return assembly.connect_engine(blueprint, stack, weights, roll_call=roll_call, timeout=self._message_timeout)

    # ------------------------------------------------------------------------------------------ a micro-batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note what the batch looks like: first and last stage have to see the same."""
        if self.positions > 1:
            self._fingerprint = batches.fingerprint(batch)
        super().on_train_batch_start(batch, batch_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the micro-batch forward: the whole model, or this rank's stages of it."""
        step = functools.partial(super().training_step, *args, **kwargs)
        if not self._pipelines:
            return step()
        if self._engine is None:
            self._engine = self._assemble(step)
        if self._trained is None:
            model: Any = self.lightning_module
            self._trained = TrainedParameters(model, self.optimizers[0])
        self._trained.check()
        out = self._engine.forward(step, without_user=self._run_in_step_context, fingerprint=self._fingerprint)
        if self._engine.is_last:
            return out
        return torch.zeros((), device=self.root_device, requires_grad=True, dtype=torch.float32)

    def _run_in_step_context(self, what: Callable[[], Any]) -> None:
        with self.precision_plugin.train_step_context():
            what()

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the loss backward, or the oldest sample whose gradient comes from the next stage."""
        engine = self._engine
        if engine is None or engine.is_last:
            backward = functools.partial(super().backward, closure_loss, optimizer, *args, **kwargs)
            result: Tensor = backward() if engine is None else engine.backward_of_loss(backward)
            return result
        if engine.gradient_is_due:
            engine.backward_of_oldest()
            model: Any = self.lightning_module
            self.precision_plugin.post_backward(closure_loss, model)
        return closure_loss.detach()

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Update this rank's stages with the gradient that has come, if one has."""
        if not self._pipelines:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        with self._own_step(), hooks.replace_step(optimizer, self._update):
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._scheduler_steps.run_due()
        if not self._draining:
            self._publish()
        return output

    def _update(self, step: Callable[[], Any]) -> None:
        """Update after forward, backward, hooks and clipping; ``step`` is the optimizer's own."""
        engine: Any = self._engine
        if engine.is_last and engine.arrived is None:
            engine.skip_loss()
        if engine.arrived:
            model: Any = self.lightning_module
            check_gradients(model, engine.weights, rank=self.global_rank, on_nonfinite=self.on_nonfinite)
        engine.update(step)

    # ------------------------------------------------------------------------------------------ where ranks meet

    def _drain(self) -> None:
        """Make every update that is under way. Later forward passes see the versions they would have seen anyway."""
        engine = self._engine
        if engine is None:
            return
        engine.timeline.pause()
        optimizer = self.optimizers[0]

        def closure() -> Tensor:
            with torch.enable_grad():
                engine.backward_of_oldest()
            return torch.zeros((), device=engine.device, dtype=torch.float32)

        self._draining = True
        while engine.in_flight:
            optimizer.zero_grad()
            self.optimizer_step(optimizer, closure, self.lightning_module)
        self._draining = False
        engine.timeline.pause()

    def _consolidate(self) -> None:
        """Drain, and give every rank the whole model."""
        self._drain()
        if self._consolidation is not None and self.positions > 1:
            with self._naming_lost_stages("bringing the weights together"):
                self._consolidation.broadcast_weights()

    def _end_epoch(self) -> None:
        """Give every rank the whole model and the metrics, before callbacks look at them."""
        self._consolidate()
        self._share_metrics()

    def _share_metrics(self) -> None:
        if self.positions > 1:
            with self._naming_lost_stages("sharing metrics"):
                broadcast_logged_metrics(self._trainer)

    def _naming_lost_stages(self, where: str) -> AbstractContextManager[None]:
        """Return the context of a collective of a running pipeline, in which ranks that do not come are named."""
        return nullcontext() if self._engine is None else self._engine.neighbours.naming_lost_ranks(where)

    def close_connections(self) -> None:
        """Close the connections to the neighbours."""
        if self._engine is not None:
            self._engine.abandon()

    def on_validation_start(self) -> None:
        """Bring the whole model together: every rank evaluates it."""
        super().on_validation_start()
        if self._trainer.state.fn == "fit":
            self._end_epoch()  # after it, callbacks may decide by a metric of training as well

    def on_train_end(self) -> None:
        """Give every rank the trained model, part from the neighbours, and say how busy the stages were."""
        self._consolidate()
        if (engine := self._engine) is not None:
            engine.close()
            folder = self._trainer.log_dir or self._trainer.default_root_dir  # all ranks together
            with self._naming_lost_stages("the end of training"):
                timelines = gather_on_rank_0((engine.timeline.spans(), engine.timeline.run))
            if timelines is not None:
                timelines.reverse()  # rank 0 has the last stage
                is_drawn = self.schedule_picture and self.positions > 1
                print_verdict(timelines, engine.weights, folder if is_drawn else None)
        super().on_train_end()

    # ------------------------------------------------------------------------------------------ figures and state

    def _publish(self) -> None:
        """Log figures every n steps, and let callbacks on all ranks see the metrics they are about to decide by."""
        step = self._trainer.global_step + 1
        if self._engine is not None and is_logged(self._trainer, step):
            self.metrics = self._engine.take_figures()
            log_figures(self._trainer, self.metrics)
        if reads_metrics_at(self._trainer, step):
            self._share_metrics()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole model's state, every update made."""
        compatibility.refuse_after_error(self.left)
        self._consolidate()
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the whole optimizer's state, on rank 0."""
        ours: dict[str, Any] = super().optimizer_state(optimizer)
        if self._consolidation is None:
            return ours
        with self._naming_lost_stages("saving the optimizer's state"):
            return self._consolidation.gather_optimizer_state(ours)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save, with the weight versions that later forward passes are to see."""
        if (engine := self._engine) is not None and "optimizer_states" in checkpoint:
            with self._naming_lost_stages("saving versions of weights"):
                parts = gather_on_rank_0(engine.weights.state())
            checkpoint[KEY] = {
                "samples": engine.weights.samples,
                "seed": engine.randomness.seed,
                "in_flight": self.in_flight,
                "layers": list(engine.stack.names),
                "starts": list(engine.partition.starts),
                "stages": [state for part in parts or [] for state in part],
            }
        elif self._saved is not None and "optimizer_states" in checkpoint:  # before the first batch of a resumed run
            checkpoint[KEY] = self._saved
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Restore the optimizers; the rest is looked at here, and restored with the first batch."""
        saved = self.info.read_state(checkpoint[KEY]) if KEY in checkpoint else None
        self._begin_run()  # what there was before, a search for a learning rate, was a run of its own
        super().load_optimizer_state_dict(checkpoint)
        self._saved = saved
