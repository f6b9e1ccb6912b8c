"""The two wrapped methods that make precision strings known to ``Trainer`` and ``Fabric``.

Lightning reads ``precision=`` in ``_check_config_and_set_final_flags`` and builds the plugin in
``_check_and_init_precision``; the connectors of the Trainer and of Fabric both have them, with the same meaning. The
first wrapper takes our part of the string away, the second grafts it onto the plugin that Lightning chose.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from lightning_eff.errors import ConfigurationError
from lightning_eff.integration.graft import check_strategy, graft, method_of
from lightning_eff.integration.names import (
    LIGHTNING_PRECISIONS,
    STRATEGIES,
    Request,
    parse_precision,
    unknown_precision,
    unknown_strategy,
)

__all__ = ["UnpatchableError", "is_patched", "patch_connector"]

_CHECK, _INIT = "_check_config_and_set_final_flags", "_check_and_init_precision"
_MARK = "_lightning_eff"


class UnpatchableError(Exception):
    """This Lightning does not have the private methods that the strings are attached to."""


def is_patched(connector: type[Any]) -> bool:
    """Return whether ``connector`` understands our precision strings."""
    return all(hasattr(getattr(connector, name, None), _MARK) for name in (_CHECK, _INIT))


def patch_connector(connector: type[Any]) -> None:
    """Wrap the two methods of a connector class; doing it again changes nothing.

    Raises:
        UnpatchableError: a method, or its ``precision`` argument, is not there.
    """
    if is_patched(connector):
        return
    check, init = getattr(connector, _CHECK, None), getattr(connector, _INIT, None)
    if check is None or init is None or "precision" not in inspect.signature(check).parameters:
        raise UnpatchableError(f"{connector.__module__}.{connector.__name__} lacks {_CHECK}(precision=) or {_INIT}()")
    for name, wrapper in ((_CHECK, _wrap_check(check)), (_INIT, _wrap_init(init))):
        setattr(wrapper, _MARK, True)
        setattr(connector, name, wrapper)


def _wrap_check(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def check_config(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        precision, plugins = bound.arguments.get("precision"), bound.arguments.get("plugins")
        request = parse_precision(precision)
        _refuse_two_precisions(precision, request, plugins)
        self._eff_request = request
        if request is not None:
            bound.arguments["precision"] = request.base_or_default
        else:
            _refuse_unknown(precision, sys.modules[original.__module__])
        try:
            original(*bound.args, **bound.kwargs)
        except ValueError as error:
            strategy = bound.arguments.get("strategy")
            if not isinstance(strategy, str) or "invalid strategy name" not in str(error):
                raise
            has_ours = _has_our_strategies(sys.modules[original.__module__])
            raise unknown_strategy(strategy, error, has_ours=has_ours) from error

    return check_config


def _has_our_strategies(module: Any) -> bool:
    """Return whether our strategies are registered where the connector looks: the Trainer's does, Fabric's does not."""
    registry = getattr(module, "StrategyRegistry", None)
    return registry is not None and all(info.name in registry.available_strategies() for info in STRATEGIES)


def _wrap_init(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def init_precision(self: Any) -> Any:
        request: Request | None = getattr(self, "_eff_request", None)
        if request is not None:
            check_strategy(request.info, self.strategy)
        plugin = original(self)
        if request is not None:
            _refuse_other_base(request, plugin, self.strategy)
            graft(plugin, request.info.name)
        info = method_of(plugin)
        if info is not None:
            check_strategy(info, self.strategy)
        return plugin

    return init_precision


def _refuse_unknown(precision: object, module: Any) -> None:
    """Let Lightning judge a precision that looks unknown, and add the nearest valid name to its message."""
    convert = getattr(module, "_convert_precision_to_unified_args", None)
    if precision is None or str(precision) in LIGHTNING_PRECISIONS or convert is None:
        return
    try:
        convert(precision)
    except ValueError as error:
        raise unknown_precision(precision, f"{error}.") from error


def _refuse_two_precisions(precision: object, request: Request | None, plugins: object) -> None:
    if precision is None or plugins is None:
        return
    for plugin in plugins if isinstance(plugins, (list, tuple, set)) else [plugins]:
        is_precision = any(ancestor.__name__ == "Precision" for ancestor in type(plugin).__mro__)
        info = method_of(plugin) or (request.info if request is not None and is_precision else None)
        if info is not None:
            raise ConfigurationError(
                f"Received both `precision={precision}` and `plugins={type(plugin).__name__}`. Choose one. To combine "
                f"{info.name!r} with a precision of Lightning write precision='{info.name}+bf16-mixed', or keep one of "
                f"Lightning's and add callbacks=[LowPrecision({info.name!r}, options=...)]."
            )


def _refuse_other_base(request: Request, plugin: Any, strategy: object) -> None:
    """Refuse a strategy instance that brings a precision plugin of its own which says something else."""
    if method_of(plugin) is None and str(plugin.precision) != request.base_or_default:
        raise ConfigurationError(
            f"precision='{request.info.name}+{request.base_or_default}' was asked for, but the given "
            f"{type(strategy).__name__} brings its own {type(plugin).__name__} with precision {plugin.precision!r}. "
            "Create the strategy without a precision plugin, or ask for "
            f"precision='{request.info.name}+{plugin.precision}'."
        )
