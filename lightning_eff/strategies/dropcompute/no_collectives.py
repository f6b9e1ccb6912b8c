"""Collectives inside ``training_step`` are refused: a rank that has dropped the micro-batch would never answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.integration.bases import StrategyBase
from lightning_eff.methods import MethodInfo

__all__ = ["NoCollectives"]


class NoCollectives(StrategyBase):
    """Lets a strategy's collectives raise while a ``training_step`` runs."""

    info: MethodInfo
    _in_step = False

    @contextlib.contextmanager
    def _no_collectives(self) -> Iterator[None]:
        """Refuse collectives inside the block."""
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
        return super().reduce(*args, **kwargs)

    def all_gather(self, *args: Any, **kwargs: Any) -> Any:
        """Gather a tensor; not inside ``training_step``."""
        self._check_no_collective("all_gather")
        return super().all_gather(*args, **kwargs)

    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        """Broadcast an object; not inside ``training_step``."""
        self._check_no_collective("broadcast")
        return super().broadcast(*args, **kwargs)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; not inside ``training_step``."""
        self._check_no_collective("barrier")
        super().barrier(*args, **kwargs)
