"""Gradients that come late, by a number of updates: which, how late, what makes it good, and what stays stable.

schedule        what each stage of a pipeline does when, and the delay that follows from it
mitigation      spike compensation, weight prediction, shrinking
directions      what an optimizer will go on to subtract: the velocity of weight prediction
stability       the largest learning rate, and the fastest training, at a given delay
curvature       the largest eigenvalue of the Hessian, to put it against
"""

from lightning_eff.functional.staleness.curvature import top_curvature
from lightning_eff.functional.staleness.directions import adam_direction, nadam_direction
from lightning_eff.functional.staleness.mitigation import (
    add_spikes_,
    extrapolate_weight,
    extrapolate_weights_,
    geometric_horizon,
    predict_weight,
    predict_weights_,
    scale_hyperparameters,
    sgd_update,
    shrink_factor,
    spectrain_horizons,
    spike_coefficients,
)
from lightning_eff.functional.staleness.schedule import (
    Operation,
    flush_bubble,
    pipeline_schedule,
    stage_delay,
    utilisation,
)
from lightning_eff.functional.staleness.stability import (
    Dynamics,
    Optimum,
    best_half_life,
    dynamics,
    half_life,
    largest_root,
    largest_roots,
    max_stable_lr,
    momentum_dynamics,
    scaled_lr,
    shifted_dynamics,
)

__all__ = [
    "Dynamics",
    "Operation",
    "Optimum",
    "adam_direction",
    "add_spikes_",
    "best_half_life",
    "dynamics",
    "extrapolate_weight",
    "extrapolate_weights_",
    "flush_bubble",
    "geometric_horizon",
    "half_life",
    "largest_root",
    "largest_roots",
    "max_stable_lr",
    "momentum_dynamics",
    "nadam_direction",
    "pipeline_schedule",
    "predict_weight",
    "predict_weights_",
    "scale_hyperparameters",
    "scaled_lr",
    "sgd_update",
    "shifted_dynamics",
    "shrink_factor",
    "spectrain_horizons",
    "spike_coefficients",
    "stage_delay",
    "top_curvature",
    "utilisation",
]
