"""Lightning's classes as mixins see them: real ones for the type checker, ``object`` at run time.

A mixin is written once and put in front of the class of whichever Lightning it is asked for
(:func:`lightning_eff.integration.namespaces.make_class`). Deriving it from these lets the checker see what ``super()``
and ``self`` have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["CallbackBase", "PrecisionBase", "StrategyBase"]

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback as CallbackBase
    from lightning.pytorch.plugins import Precision as PrecisionBase
    from lightning.pytorch.strategies import DDPStrategy as StrategyBase
else:
    CallbackBase = PrecisionBase = StrategyBase = object
