"""Low precision by callback: no string, no patch, and options in the same line.

The graft happens in ``setup``, which Lightning calls before it configures and converts the model. It is the way to
give a method options together with one of Lightning's precisions, and the way that is left should a future Lightning
change the private methods the strings are attached to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_eff.checks import Instance, Maybe, Text, check
from lightning_eff.errors import ConfigurationError
from lightning_eff.integration.bases import CallbackBase
from lightning_eff.integration.graft import check_options, check_strategy, graft
from lightning_eff.integration.names import Request, parse_precision, precision_method
from lightning_eff.methods import METHODS, MethodInfo

__all__ = ["LowPrecisionMixin"]


class LowPrecisionMixin(CallbackBase):
    """Put a low-precision method onto the precision plugin that the Trainer has chosen.

    ``Trainer(precision="bf16-mixed", callbacks=[LowPrecision("luq4")])`` is ``Trainer(precision="luq4+bf16-mixed")``.
    It acts once, in the first ``setup``; further ``fit``, ``validate`` and ``test`` calls find it done.

    Args:
        method: a precision method (``"luq4"``); ``"luq4+bf16-mixed"`` also checks what the Trainer has chosen.
        options: arguments of the method's class, for example ``{"levels": 8}``.

    Raises:
        UnknownMethodError: no such method (the nearest is named).
        UnsupportedCombinationError: in ``setup``, when the Trainer's precision or strategy does not go with the method.
        ConfigurationError: an option is unknown or outside its range; in ``setup``, the method is already there with
            other options.
    """

    info: ClassVar[MethodInfo] = METHODS["low_precision"]

    def __init__(self, method: str = "luq4", options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.method: str = check("method", method, Text("the name of a precision method"))
        self._request = parse_precision(self.method) or Request(precision_method(self.method), None)
        self.options: dict[str, Any] = dict(check("options", options, Maybe(Instance(Mapping, "a mapping"))) or {})
        check_options(self._request.info.name, self.options)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Graft the method before Lightning converts the model."""
        super().setup(trainer, pl_module, stage)
        plugin = trainer.strategy.precision_plugin
        check_strategy(self._request.info, trainer.strategy)
        if self._request.base not in (None, str(plugin.precision)):
            raise ConfigurationError(
                f"LowPrecision({self.method!r}) expects Lightning's precision {self._request.base!r} below it, but "
                f"this Trainer has {plugin.precision!r}. Write Trainer(precision={self._request.base!r}) or "
                f"LowPrecision({self._request.info.name!r})."
            )
        graft(plugin, self._request.info.name, **self.options)
