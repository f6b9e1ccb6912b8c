"""One mixin, four Lightnings: concrete classes are made per namespace from Lightning-free mixins.

``lightning.pytorch``, ``pytorch_lightning`` and their two Fabrics are textual copies whose classes do not accept each
other (each connector checks ``isinstance``). A shell is therefore written once, as a mixin, and :func:`make_class`
joins it to the base class at hand. The name is the same in every namespace, because Lightning uses ``__qualname__`` as
the key of a plugin's state in a checkpoint.
"""

from __future__ import annotations

import copyreg
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from lightning_eff.errors import MissingDependencyError
from lightning_eff.methods import METHODS

__all__ = ["NAMESPACES", "Namespace", "base_class", "class_getter", "make_class", "public_classes"]

Kind = Literal["precision", "strategy", "callback"]

_BASES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "precision": ("plugins", "Precision"),
        "strategy": ("strategies", "DDPStrategy"),
        "callback": ("callbacks", "Callback"),
    }
)
"""kind -> submodule of the namespace and the class a public class is built on."""

_PUBLIC_MODULES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("lightning", "Precision"): "lightning_eff.precision",
        ("lightning", "DDPStrategy"): "lightning_eff.strategies",
        ("lightning", "Callback"): "lightning_eff.callbacks",
        ("pytorch_lightning", "Precision"): "lightning_eff.pytorch_lightning",
        ("pytorch_lightning", "DDPStrategy"): "lightning_eff.pytorch_lightning",
        ("pytorch_lightning", "Callback"): "lightning_eff.pytorch_lightning",
    }
)
"""Package and name of the base class -> module from which the made class can be imported."""


@dataclass(frozen=True)
class Namespace:
    """Where one copy of Lightning keeps the parts this package touches.

    Attributes:
        root: package to import, for example ``lightning.pytorch``.
        entry_module: leaf module that defines the entry class; once it has run, everything needed is imported.
        entry_class: ``Trainer`` or ``Fabric``.
        connector_module: module that parses ``precision=`` and ``strategy=``.
        connector_class: the class in it.
    """

    root: str
    entry_module: str
    entry_class: str
    connector_module: str
    connector_class: str


def _trainer(root: str) -> Namespace:
    connector = f"{root}.trainer.connectors.accelerator_connector"
    return Namespace(root, f"{root}.trainer.trainer", "Trainer", connector, "_AcceleratorConnector")


def _fabric(root: str) -> Namespace:
    return Namespace(root, f"{root}.fabric", "Fabric", f"{root}.connector", "_Connector")


NAMESPACES: tuple[Namespace, ...] = (
    _trainer("lightning.pytorch"),
    _fabric("lightning.fabric"),
    _trainer("pytorch_lightning"),
    _fabric("lightning_fabric"),
)
"""Every Lightning this package serves."""


def _rebuild(mixin: type[Any], base: type[Any]) -> Any:
    """Return an empty instance of the class made from ``mixin`` and ``base`` (unpickling)."""
    made: Any = make_class(mixin, base)
    return made.__new__(made)


def _class_name(mixin: type[Any]) -> str:
    info = getattr(mixin, "info", None)
    return str(info.class_name) if info is not None else mixin.__name__.removesuffix("Mixin")


def _home(base: type[Any]) -> str:
    """Return the module a made class claims to live in: an importable one whenever there is one."""
    package = base.__module__.partition(".")[0]
    is_fabric = base.__module__.startswith(("lightning.fabric", "lightning_fabric"))
    return __name__ if is_fabric else _PUBLIC_MODULES.get((package, base.__name__), __name__)


_MADE: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def make_class(mixin: type[Any], base: type[Any]) -> type[Any]:
    """Return the class ``(mixin, base)``; equal arguments give the same class.

    The mixin's constructor stays the visible one, so ``inspect.signature`` and LightningCLI read its arguments.
    Instances are pickled as "make the class again, then fill it", which survives a fresh interpreter (``ddp_spawn``).

    Args:
        mixin: Lightning-free class; its ``info.class_name`` is the name, or else its own name without ``Mixin``.
        base: a class of one Lightning namespace (or a subclass of one).
    """
    if (mixin, base) not in _MADE:
        _MADE[mixin, base] = _build(mixin, base)
    return _MADE[mixin, base]


def _build(mixin: type[Any], base: type[Any]) -> type[Any]:
    def reduce_ex(self: Any, protocol: int) -> Any:
        reduced = super(made, self).__reduce_ex__(max(protocol, 2))
        is_ours = type(self) is made  # a user's subclass is importable and pickles as it always did
        if is_ours and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _rebuild, (mixin, base), *reduced[2:]
        return reduced

    body: dict[str, Any] = {"__module__": _home(base), "__doc__": mixin.__doc__, "__reduce_ex__": reduce_ex}
    info = getattr(mixin, "info", None)
    if info is not None:
        body["eff_method"] = info.name
    made: type[Any] = type(_class_name(mixin), (mixin, base), body)
    return made


def base_class(root: str, kind: Kind) -> type[Any]:
    """Import and return the class of namespace ``root`` that a public class of this kind is built on.

    Raises:
        MissingDependencyError: the namespace is not installed.
    """
    submodule, name = _BASES[kind]
    try:
        base: type[Any] = getattr(importlib.import_module(f"{root}.{submodule}"), name)
    except ModuleNotFoundError as error:
        package = root.partition(".")[0]
        if error.name != package:  # Lightning is there, something it needs is not: its own error says what
            raise
        distribution = package.replace("_", "-")
        raise MissingDependencyError(
            f"The {kind} classes for {root} need the package {distribution!r}. Run: pip install {distribution}"
        ) from error
    return base


def public_classes(kind: Kind) -> dict[str, tuple[Kind, str]]:
    """Return class name -> (kind, ``"module:Mixin"``) of every public class of this kind."""
    return {info.class_name: (kind, info.mixin) for info in METHODS.values() if info.kind == kind}


def class_getter(module: str, root: str, shells: Mapping[str, tuple[Kind, str]]) -> Callable[[str], type[Any]]:
    """Return a module ``__getattr__`` (PEP 562) that makes each public class when it is first asked for.

    Args:
        module: name of the module the function is for (only used in the error).
        root: namespace of the base classes.
        shells: class name -> (kind, ``"module:Mixin"``).
    """

    def getter(name: str) -> type[Any]:
        if name not in shells:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        kind, path = shells[name]
        shell_module, _, attribute = path.partition(":")
        return make_class(getattr(importlib.import_module(shell_module), attribute), base_class(root, kind))

    return getter
