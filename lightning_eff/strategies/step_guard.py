"""Optimizer steps beside the strategy are refused before they do harm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.integration.bases import StrategyBase
from lightning_eff.methods import MethodInfo
from lightning_eff.runtime.patches import Undo

__all__ = ["StepGuard"]


class StepGuard(StrategyBase):
    """Lets nobody but the strategy step its optimizer.

    Somebody else does where ``self.optimizers(use_pl_optimizer=False)`` is stepped.
    """

    info: MethodInfo
    _stepping = False

    def setup_optimizers(self, trainer: Any) -> None:
        """Ask the module for its optimizer; refuse several, which Lightning does too, as any other combination."""
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            if "multiple optimizers" not in str(error):
                raise
            raise UnsupportedCombinationError(
                f"{self.info.name!r} needs one optimizer and configure_optimizers returned several. Give one optimizer "
                "several parameter groups instead."
            ) from error

    @contextlib.contextmanager
    def _own_step(self) -> Iterator[None]:
        """Allow the optimizer's step inside the block."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _refuse_other_steps(self) -> list[Undo]:
        """Let the optimizers raise where somebody else steps them; return what ends that."""
        registers = [getattr(optimizer, "register_step_pre_hook", None) for optimizer in self.optimizers]
        return [register(self._check_own).remove for register in registers if register is not None]

    def _check_own(self, optimizer: Any, *_: Any) -> None:
        if not self._stepping:
            raise UnsupportedCombinationError(
                f"{type(optimizer).__name__}.step() was called without {self.info.name!r}, which makes the step what "
                "it is. Step what optimizer_step() is given or self.optimizers() returns, not "
                "self.optimizers(use_pl_optimizer=False)."
            )
