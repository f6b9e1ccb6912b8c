"""The graft: Lightning picks its own plugin for the strategy and the precision, then that object becomes ours.

Lightning builds the plugin as it always does; :func:`graft` changes the object's class to (our mixin, its class). The
plugin's ``precision`` stays Lightning's own string, because loggers, summaries and strategies read it; ours is
``plugin.eff_method``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning_eff.checks import shown
from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError, nearest
from lightning_eff.integration.names import check_base, precision_method
from lightning_eff.integration.namespaces import make_class
from lightning_eff.methods import METHODS, MethodInfo

__all__ = ["check_options", "check_strategy", "graft", "method_of", "strategy_family"]

_FAMILIES: tuple[tuple[str, str], ...] = (
    ("DeepSpeedStrategy", "deepspeed"),  # in the Trainer a subclass of DDPStrategy: specific names first
    ("XLAStrategy", "xla"),
    ("XLAFSDPStrategy", "xla"),
    ("SingleDeviceXLAStrategy", "xla"),
    ("FSDPStrategy", "fsdp"),
    ("ModelParallelStrategy", "model_parallel"),
    ("DataParallelStrategy", "dp"),
    ("DDPStrategy", "ddp"),
    ("SingleDeviceStrategy", "single_device"),
)
"""Class name found among a strategy's ancestors -> family, in the order in which they are tried."""


def strategy_family(strategy: object) -> str:
    """Return the family of a strategy instance (``"ddp"``, ``"fsdp"``, ...), or ``"unknown"``.

    A ``ModelParallelStrategy`` is ``"fsdp2"`` when it says ``tensor_parallel_size=1`` and ``"model_parallel"`` when it
    may split layers: its default is one tensor-parallel group per node, which is known only when the run starts.
    Fabric's ``DeepSpeedStrategy`` is ``"fabric_deepspeed"``.
    """
    ancestors = {ancestor.__name__: ancestor for ancestor in type(strategy).__mro__}
    family = next((family for name, family in _FAMILIES if name in ancestors), "unknown")
    if family == "model_parallel" and getattr(strategy, "_tensor_parallel_size", None) == 1:
        return "fsdp2"
    if family == "deepspeed" and "fabric" in ancestors["DeepSpeedStrategy"].__module__:
        return "fabric_deepspeed"
    return family


def check_strategy(info: MethodInfo, strategy: object) -> None:
    """Refuse a strategy that the method has not been shown to work with.

    Raises:
        UnsupportedCombinationError: names the strategy, the reason, what is allowed and what to do.
    """
    family = strategy_family(strategy)
    if family not in info.strategies:
        other = "ddp" if "ddp" in info.strategies else info.strategies[-1]
        reason = info.conflicts.get(family, f"not shown to work; use strategy={other!r}")
        raise UnsupportedCombinationError(
            f"{info.name!r} cannot be combined with {type(strategy).__name__} (family {family!r}): {reason}. "
            f"Allowed strategy families: {', '.join(info.strategies)}. "
            f"To keep this strategy, remove {info.name!r} and use one of Lightning's precisions."
        )


def method_of(plugin: object) -> MethodInfo | None:
    """Return the row of the method a plugin carries, or None for a plugin of Lightning's own."""
    name = getattr(plugin, "eff_method", None)
    info: MethodInfo | None = METHODS.get(name or "") or getattr(plugin, "info", None)
    return info if name else None


def graft(plugin: Any, method: str, **options: Any) -> Any:
    """Change ``plugin`` in place into (our mixin, its own class) and return it.

    A plugin that already carries the same method with the same options is returned as it is.

    Args:
        plugin: a precision plugin of any Lightning namespace.
        method: name of a precision method, without ``+``.
        options: arguments of the method's class, for example ``levels=8``.

    Raises:
        UnknownMethodError: no such method.
        ConfigurationError: an option the method does not have, or the plugin already carries other options.
        UnsupportedCombinationError: the plugin's precision does not go with the method, or it carries another method.
    """
    info = precision_method(method)
    shell = info.load_mixin()
    check_options(method, options)
    present = method_of(plugin)
    if present is not None:
        _check_same(plugin, present, info, options)
        return plugin
    check_base(info, str(plugin.precision))
    original = type(plugin)
    plugin.__class__ = make_class(shell, original)
    plugin.eff_method, plugin.eff_options = info.name, dict(options)
    try:
        plugin.configure_method(**options)
    except ConfigurationError:  # Lightning still tears the plugin down: leave it as it was
        plugin.__class__ = original
        del plugin.eff_method, plugin.eff_options
        raise
    return plugin


def check_options(method: str, options: Mapping[Any, Any]) -> None:
    """Look at the options of a method before there is a plugin to graft it onto.

    Raises:
        ConfigurationError: the method has no such option, or an option is outside its range.
    """
    info = precision_method(method)
    shell = info.load_mixin()
    _check_names(info, shell, options)
    tried: Any = object.__new__(shell)
    tried.eff_method = info.name
    tried.configure_method(**options)


def _check_names(info: MethodInfo, shell: type[Any], options: Mapping[Any, Any]) -> None:
    known = [name for name in inspect.signature(shell.__init__).parameters if name != "self"]
    for name in options:
        if not isinstance(name, str) or name not in known:
            raise ConfigurationError(
                f"{info.name!r} has no option {shown(name)}.{nearest(name if isinstance(name, str) else '', known)} "
                f"Its options: {', '.join(known) or 'none'}."
            )


def _check_same(plugin: Any, present: MethodInfo, info: MethodInfo, options: dict[str, Any]) -> None:
    if present.name != info.name:
        raise UnsupportedCombinationError(
            f"This Trainer's precision plugin already carries {present.name!r}; {info.name!r} cannot be added. "
            "Keep one."
        )
    if options and options != getattr(plugin, "eff_options", None):
        raise ConfigurationError(
            f"{info.name!r} was asked for twice: the plugin that is already there has the options "
            f"{getattr(plugin, 'eff_options', 'of its own constructor')}, now {options} were given. Keep one."
        )
