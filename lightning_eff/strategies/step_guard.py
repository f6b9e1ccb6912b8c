"""Refused before they do harm: collectives inside ``training_step``, optimizer steps beside the strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.methods import MethodInfo
from lightning_eff.runtime.patches import Undo


class CollectiveGuard:
    """A strategy whose collectives raise while a ``training_step`` runs."""

    info: MethodInfo
    _in_step = False

    @contextlib.contextmanager
    def _no_collectives(self) -> Iterator[None]:
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def _check_no_collective(self, name: str) -> None:
        if self._in_step:
            raise UnsupportedCombinationError(
                f"training_step calls {name}() between the ranks, and under {self.info.name!r} other ranks may have "
                "dropped this micro-batch and never answer. Use self.log(..., on_step=False, on_epoch=True, "
                "sync_dist=True) or strategy='ddp'."
            )

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """Reduce a tensor; not inside ``training_step``."""
        self._check_no_collective("reduce")
        return super().reduce(*args, **kwargs)  # type: ignore[misc]

    def all_gather(self, *args: Any, **kwargs: Any) -> Any:
        """Gather a tensor; not inside ``training_step``."""
        self._check_no_collective("all_gather")
        return super().all_gather(*args, **kwargs)  # type: ignore[misc]

    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        """Broadcast an object; not inside ``training_step``."""
        self._check_no_collective("broadcast")
        return super().broadcast(*args, **kwargs)  # type: ignore[misc]

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; not inside ``training_step``."""
        self._check_no_collective("barrier")
        super().barrier(*args, **kwargs)  # type: ignore[misc]


class StepGuard:
    """A strategy whose optimizer is stepped by it alone.

    Somebody else does where ``self.optimizers(use_pl_optimizer=False)`` is stepped.
    """

    info: MethodInfo
    optimizers: Any
    _stepping = False

    def setup_optimizers(self, trainer: Any) -> None:
        """Ask the module for its optimizer; refuse several, which Lightning does too, as any other combination."""
        try:
            super().setup_optimizers(trainer)  # type: ignore[misc]
        except RuntimeError as error:
            if "multiple optimizers" not in str(error):
                raise
            raise UnsupportedCombinationError(
                f"{self.info.name!r} needs one optimizer and configure_optimizers returned several. Give one optimizer "
                "several parameter groups instead."
            ) from error

    @contextlib.contextmanager
    def _own_step(self) -> Iterator[None]:
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _refuse_other_steps(self) -> list[Undo]:
        registers = [getattr(optimizer, "register_step_pre_hook", None) for optimizer in self.optimizers]
        return [register(self._check_own).remove for register in registers if register is not None]

    def _check_own(self, optimizer: Any, *_: Any) -> None:
        if not self._stepping:
            raise UnsupportedCombinationError(
                f"{type(optimizer).__name__}.step() was called without {self.info.name!r}, which makes the step what "
                "it is. Step what optimizer_step() is given or self.optimizers() returns, not "
                "self.optimizers(use_pl_optimizer=False)."
            )
