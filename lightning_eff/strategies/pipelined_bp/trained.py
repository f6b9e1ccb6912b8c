"""Parameters that are trained: others than those the stages were made of would never be updated."""

from __future__ import annotations

import torch
from torch import nn

from lightning_eff.errors import UnsupportedCombinationError

__all__ = ["TrainedParameters"]


class TrainedParameters:
    """Remembers which parameters are trained; a stage is made of those that are when it is cut."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._were = [(p, p.requires_grad) for p in model.parameters()]
        self._groups = self._sizes()

    def _sizes(self) -> list[int]:
        return [len(group["params"]) for group in self._optimizer.param_groups]

    def check(self) -> None:
        """Raise if others are trained by now, which would never be updated.

        Raises:
            UnsupportedCombinationError: layers were replaced, or parameters frozen, unfrozen or added.
        """
        now = list(self._model.parameters())
        if len(now) != len(self._were) or any(p is not q for p, (q, _) in zip(now, self._were, strict=True)):
            raise UnsupportedCombinationError(
                "'pipelined_bp' cannot be combined with what replaces, adds or removes layers while the run goes on. "
                "Change the model before fit, or between two."
            )
        if any(p.requires_grad != was for p, was in self._were) or self._sizes() != self._groups:
            raise UnsupportedCombinationError(
                "'pipelined_bp' cannot be combined with what freezes or unfreezes parameters while the run goes on "
                "(BaseFinetuning, add_param_group). Freeze them before fit, and begin another fit to train others."
            )
