"""What is done about the delay: which weights forward and backward passes see, and what an update does with a gradient.

    none        forward with the weights at hand, backward with those of then
    sc          spike compensation: w' = w - lr (a v' + b g), (a, b) of the stage's delay
    lwp         linear weight prediction, velocity form: forward with w - lr T v
    lwp_w       the same from the last two weights: forward with w_t + T (w_t - w_{t-1})
    stash       backward with the weights of the forward pass (PipeDream)
    spectrain   forward and backward both with the weights predicted for one and the same moment
    shrink      a gradient that is D updates late counts gamma^D

``lwp+sc`` is the recommended one; ``+`` joins what can be joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.checks import Text, check, shown
from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError, nearest
from lightning_eff.functional.staleness.directions import adam_direction, nadam_direction
from lightning_eff.strategies.pipelined_bp.options import HORIZON, SHRINK

PARTS = ("none", "lwp", "lwp_w", "sc", "stash", "spectrain", "shrink")
_ALTERNATIVES = {"lwp", "lwp_w", "spectrain", "none"}
_ADAM = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam)

Group = dict[str, Any]


@dataclass(frozen=True)
class Mitigation:
    """Holds a parsed ``mitigation=``.

    Attributes:
        parts: what is joined.
        horizon: multiple of a stage's delay that prediction and compensation are for.
        gamma: of gradient shrinking.
    """

    parts: frozenset[str]
    horizon: float = 1.0
    gamma: float = 1.0

    @property
    def predicts(self) -> bool:
        """Whether forward passes see predicted weights."""
        return bool(self.parts & {"lwp", "lwp_w", "spectrain"})

    @property
    def stashes(self) -> bool:
        """Whether backward passes see the weights of their forward pass."""
        return "stash" in self.parts

    def without(self, *parts: str) -> Mitigation:
        """Return the same mitigation without some parts."""
        return Mitigation(self.parts - set(parts) or frozenset({"none"}), self.horizon, self.gamma)

    def __str__(self) -> str:
        return "+".join(part for part in PARTS if part in self.parts)


def parse_mitigation(text: str, *, horizon: float | None, gamma: float, stash: bool) -> Mitigation:
    """Read ``"lwp+sc"`` and the like.

    Raises:
        ConfigurationError: a part is unknown, or two exclude each other, or a number is out of its range.
    """
    parts = check("mitigation", text, Text("parts joined with '+', as in 'lwp+sc'")).split("+")
    horizon, gamma = check("horizon", horizon, HORIZON), check("shrink_factor", gamma, SHRINK)
    for part in parts:
        if part not in PARTS:
            raise ConfigurationError(
                f"mitigation={shown(text)} is not allowed: {shown(part)} is none of {', '.join(PARTS)}."
                f"{nearest(part, PARTS)} "
                "Join parts with '+', as in 'lwp+sc'."
            )
    if len(set(parts) & _ALTERNATIVES) > 1 or ("none" in parts and len(parts) > 1) or len(set(parts)) < len(parts):
        raise ConfigurationError(
            f"mitigation={text!r} is not allowed: at most one of lwp, lwp_w and spectrain, and 'none' alone."
        )
    found = frozenset(parts) | ({"stash"} if stash else set())
    found = found - {"none"} or frozenset({"none"})
    return Mitigation(found, 1.0 if horizon is None else horizon, gamma if "shrink" in parts else 1.0)


def adapt_to_optimizer(mitigation: Mitigation, optimizer: torch.optim.Optimizer) -> tuple[Mitigation, str]:
    """Return what of the mitigation this optimizer can do, and a sentence on what it cannot ('' if it can do all).

    Raises:
        UnsupportedCombinationError: nothing sensible is left.
    """
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    is_sgd = isinstance(optimizer, torch.optim.SGD)
    if is_sgd and all(group["momentum"] == 0 for group in groups) and mitigation.parts & {"lwp", "sc", "spectrain"}:
        return mitigation.without("lwp", "sc", "spectrain"), (
            "SGD without momentum has no velocity to predict weights from or to compensate for: this is plain delayed "
            "SGD. Use momentum, or mitigation='lwp_w'."
        )
    if "sc" in mitigation.parts and is_sgd:
        odd = [name for name in ("nesterov", "dampening", "maximize") if any(group[name] for group in groups)]
        if odd:
            raise UnsupportedCombinationError(
                f"Spike compensation is defined for SGD with plain momentum (it is Nesterov's for a delay of 1), and "
                f"this SGD has {', '.join(odd)}. Use torch.optim.SGD(..., momentum=m), or mitigation='lwp_w'."
            )
    said = ""
    if "sc" in mitigation.parts and not is_sgd:
        mitigation = mitigation.without("sc")
        said = f"Spike compensation is defined for SGD with momentum; with {kind} there is only {mitigation}."
    if mitigation.parts & {"lwp", "spectrain"} and not is_sgd and not isinstance(optimizer, _ADAM):
        raise UnsupportedCombinationError(
            f"mitigation={str(mitigation)!r} needs to know what {kind} will subtract, and knows that of SGD, Adam, "
            "AdamW and NAdam. Use mitigation='lwp_w', which takes the last two weights."
        )
    return mitigation, said


def velocity(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, group: Group) -> Tensor | None:
    """Return what the optimizer will go on to subtract per unit of lr; None before its first step."""
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    if "exp_avg" not in state:
        buffer: Tensor | None = state.get("momentum_buffer")
        return buffer
    first, second = state["exp_avg"], state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    step, betas, eps = int(state["step"]), (float(group["betas"][0]), float(group["betas"][1])), float(group["eps"])
    if isinstance(optimizer, torch.optim.NAdam):
        more = {"momentum_decay": float(group["momentum_decay"]), "mu_product": float(state["mu_product"])}
        direction = nadam_direction(first, second, step, betas=betas, eps=eps, **more)
    else:
        direction = adam_direction(first, second, step, betas=betas, eps=eps)
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    if decoupled and step and (decay := float(group["weight_decay"])):
        direction = direction.add_(parameter.detach(), alpha=decay)
    return direction.to(parameter.dtype)
