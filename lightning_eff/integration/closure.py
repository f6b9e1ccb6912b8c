"""The place between backward and the optimizer's step, where the Trainer calls a precision plugin."""

from __future__ import annotations

from typing import Any

from lightning_eff.integration.bases import PrecisionBase

__all__ = ["AfterClosureMixin"]


class AfterClosureMixin(PrecisionBase):
    """Tells a precision plugin when the Trainer has run the closure of a step: gradients are there, nothing is updated.

    Fabric has no such place.
    """

    def is_told_after_closure(self) -> bool:
        """Return whether :meth:`after_backward` will be called."""
        return hasattr(super(), "_after_closure")

    def after_backward(self, model: Any) -> None:
        """Look at the gradients of a step.

        Args:
            model: the LightningModule.
        """

    def _after_closure(self, model: Any, optimizer: Any) -> None:
        self.after_backward(model)
        super()._after_closure(model, optimizer)
