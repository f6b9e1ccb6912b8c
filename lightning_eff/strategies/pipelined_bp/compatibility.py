"""Refusals of pipelined_bp before the first step, and warnings of what will go wrong."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import nn

from lightning_eff.errors import (
    ConfigurationError,
    EffWarning,
    NoEffectWarning,
    RankLostError,
    UnsupportedCombinationError,
)
from lightning_eff.functional.staleness import stability
from lightning_eff.integration.trainer_parts import is_compiled
from lightning_eff.methods import METHODS
from lightning_eff.runtime.contracts import ScalePredictor
from lightning_eff.runtime.roll_call import RollCall
from lightning_eff.strategies.pipelined_bp.mitigation import Mitigation

MOST_EFFECTIVE_DELAY = 1.0
"""D (1 - m) above which no mitigation here can be expected to help; with a large learning rate it fails earlier."""


def refuse_trainer(trainer: Any, *, num_stages: int | str | Sequence[str], positions: int) -> None:
    """Raise for what this Trainer asks for and a pipeline cannot do; warn if nothing is changed.

    Args:
        trainer: Lightning's.
        num_stages: how many, "layers" or names.
        positions: number of processes.
    """
    model = trainer.lightning_module
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    reasons = {
        "manual optimization": (
            not model.automatic_optimization,
            "it runs forward, backward and step by itself. Remove self.automatic_optimization = False",
        ),
        f"accumulate_grad_batches={trainer.accumulate_grad_batches}": (
            trainer.accumulate_grad_batches != 1,
            "every micro-batch is an update. Set it to 1, and scale the learning rate to the smaller batch",
        ),
        "precision='16-mixed'": (
            scaler is not None,
            "its loss scaler would have to agree over stages that are at different samples. Use 'bf16-mixed'",
        ),
        "torch.compile of the whole LightningModule": (
            is_compiled(model),
            "a pipeline runs its layers one by one. Compile the layers",
        ),
    }
    for what, (applies, why) in reasons.items():
        if applies:
            raise UnsupportedCombinationError(f"'pipelined_bp' cannot be combined with {what}: {why}.")
    averaging = [
        type(callback).__name__
        for callback in trainer.callbacks
        if positions > 1 and any(kind.__name__ == "WeightAveraging" for kind in type(callback).__mro__)
    ]
    if averaging:
        raise UnsupportedCombinationError(
            f"'pipelined_bp' cannot be combined with {averaging[0]}: after a step a rank has the weights of its own "
            "stages alone. Average checkpoints afterwards, or use StochasticWeightAveraging (between epochs)."
        )
    _refuse_callbacks(trainer, model, is_pipeline=num_stages != 1)
    if isinstance(num_stages, int) and num_stages < positions:
        raise ConfigurationError(
            f"stages={num_stages} cannot be spread over {positions} processes. Use Trainer(devices={num_stages})."
        )
    if num_stages == 1:
        warnings.warn(
            "pipelined_bp changes nothing with one stage in one process. Use Trainer(devices=2), or stages=4 to "
            "compute the delays of a pipeline of four in one process.",
            NoEffectWarning,
            stacklevel=2,
        )


def _refuse_callbacks(trainer: Any, model: nn.Module, *, is_pipeline: bool) -> None:
    """Raise for callbacks that change, while the run goes on, how many micro-batches an update has."""
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    for callback in trainer.callbacks:
        kinds = {kind.__name__ for kind in type(callback).__mro__}
        if "GradientAccumulationScheduler" in kinds and set(callback.scheduling.values()) != {1}:
            raise UnsupportedCombinationError(
                "'pipelined_bp' cannot be combined with GradientAccumulationScheduler: every micro-batch is an update. "
                "Remove it."
            )
        if "BaseFinetuning" in kinds and is_pipeline:
            raise UnsupportedCombinationError(
                f"'pipelined_bp' cannot be combined with {type(callback).__name__}, which unfreezes parameters while "
                "the run goes on. Freeze them before fit, and begin another fit to train others."
            )
        if "StochasticWeightAveraging" in kinds and normed:
            raise UnsupportedCombinationError(
                "'pipelined_bp' cannot be combined with StochasticWeightAveraging of a model with BatchNorm, which "
                "adds an epoch without updates to measure its statistics anew. Use GroupNorm or LayerNorm."
            )


def refuse_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise for optimizers that a pipeline cannot run."""
    if len(optimizers) != 1:
        raise UnsupportedCombinationError(
            f"'pipelined_bp' needs one optimizer and configure_optimizers returned {len(optimizers)}. Give one "
            "optimizer several parameter groups instead."
        )
    if isinstance(optimizers[0], torch.optim.LBFGS):
        raise UnsupportedCombinationError(
            "'pipelined_bp' cannot be combined with LBFGS, which computes the loss several times in a step. Use SGD "
            "with momentum, or Adam."
        )


def refuse_predicted_scales(plugin: Any, *, positions: int) -> None:
    """Raise for a precision whose layers predict scales: each rank would remember, and save, its own layers' alone."""
    predicts_scales = isinstance(plugin, ScalePredictor) and plugin.predicts_scales()
    if positions > 1 and predicts_scales:
        raise UnsupportedCombinationError(
            f"'pipelined_bp' over {positions} processes cannot be combined with {plugin.info.name!r}, whose layers "
            "predict scales from the steps before: a resumed run would go on from other ones. Use one process "
            f"(stages=...), or a precision without memory: {_without_memory()}."
        )


def _without_memory() -> str:
    rows = [info for info in METHODS.values() if info.kind == "precision" and "memory" not in info.state_keys]
    return ", ".join(repr(info.name) for info in rows)


def refuse_after_error(left: RollCall | None) -> None:
    """Raise if this rank has left the others: the weights of their stages are not to be had.

    Args:
        left: roll call of a run that an error has ended here.

    Raises:
        RankLostError: ``left`` is not None.
    """
    if left is not None and left.world > 1:
        raise RankLostError(
            f"pipelined_bp: no checkpoint can be made after an error: rank {left.rank} holds the weights of its own "
            "stages alone. Save checkpoints while the run goes on (ModelCheckpoint)."
        )


def warn_if_unstable(
    optimizer: torch.optim.Optimizer,
    mitigation: Mitigation,
    *,
    delays: Sequence[int],
    curvatures: Sequence[float | None],
) -> None:
    """Warn where the analysis says that a stage cannot train, or will not train well.

    Args:
        optimizer: the user's; all but SGD is passed over.
        mitigation: what is done about the delay.
        delays: D_s of every stage, updates.
        curvatures: largest curvature of the loss in the directions of every stage's weights, where it is known.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    group = max(optimizer.param_groups, key=lambda group: float(group["lr"]))
    lr, momentum = float(group["lr"]), float(group["momentum"])
    effective = delays[0] * (1 - momentum)
    if momentum and effective > MOST_EFFECTIVE_DELAY:
        warnings.warn(
            f"pipelined_bp: a delay of {delays[0]} updates with momentum {momentum:g} is D(1-m) = {effective:.1f}. "
            "Prediction and compensation help up to about 1. Use smaller micro-batches with the hyperparameters "
            "scaled to them (lightning_eff.functional.scale_hyperparameters), fewer stages, or adaptive "
            "braking (Venigalla et al. 2020), which is for such delays.",
            EffWarning,
            stacklevel=2,
        )
    name: Any = str(mitigation) if str(mitigation) in get_args(stability.MitigationName) else "none"
    limits = [
        (stability.max_stable_lr(curvature, delay, momentum, mitigation=name), stage, delay, curvature)
        for stage, (delay, curvature) in enumerate(zip(delays, curvatures, strict=True))
        if curvature is not None and curvature > 0
    ]
    if limits and lr > min(limits)[0]:
        limit, stage, delay, curvature = min(limits)
        warnings.warn(
            f"pipelined_bp: lr={lr:g} with momentum {momentum:g} is not stable in stage {stage}, with a delay of "
            f"{delay} and a curvature of {curvature:.3g}; with {name!r} the limit is {limit:.3g} (linear analysis). "
            "Lower lr to that, warm it up, or use adaptive braking.",
            EffWarning,
            stacklevel=2,
        )


def warn_of_other_stages(
    *, saved_starts: Sequence[str], saved_in_flight: int, starts: Sequence[str], in_flight: int
) -> None:
    """Warn that a checkpoint is of a pipeline that was cut elsewhere.

    Args:
        saved_starts: names of the layers that the checkpoint's stages begin with.
        saved_in_flight: of the checkpoint.
        starts: names of the layers that this run's stages begin with.
        in_flight: of this run.
    """
    warnings.warn(
        f"pipelined_bp: the checkpoint's stages begin at {saved_starts} with in_flight={saved_in_flight}, this run's "
        f"at {starts} with in_flight={in_flight}. Weights and optimizer are restored; delays begin anew, as at the "
        "beginning of a run.",
        EffWarning,
        stacklevel=2,
    )
