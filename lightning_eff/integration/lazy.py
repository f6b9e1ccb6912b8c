"""Patch what is imported, wait for what is not: ``import lightning_eff`` costs no Lightning import.

A finder at the head of ``sys.meta_path`` waits for the *leaf* modules that define ``Trainer`` and ``Fabric`` (the root
packages may already be half imported when we come) and patches the namespace right after the leaf has run. The order of
``import lightning`` and ``import lightning_eff`` does not matter. Nothing here may break an import of Lightning:
whatever goes wrong becomes a :class:`~lightning_eff.errors.FallbackWarning` that names the way without strings.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lightning_eff.errors import FallbackWarning
from lightning_eff.integration.cli import register_with_jsonargparse, widen_precision
from lightning_eff.integration.connector import is_patched, patch_connector
from lightning_eff.integration.namespaces import NAMESPACES, Namespace
from lightning_eff.integration.registry import register_strategies

__all__ = ["install", "patch_namespace", "status"]


def patch_namespace(namespace: Namespace) -> None:
    """Make the strings known to one namespace, whose entry module must be imported; repeating it changes nothing."""
    try:
        patch_connector(getattr(sys.modules[namespace.connector_module], namespace.connector_class))
        entry = getattr(sys.modules[namespace.entry_module], namespace.entry_class)
        widen_precision(entry.__init__)
        register_strategies(namespace)
    except Exception as error:  # noqa: BLE001 - the user's import of Lightning must go on whatever happened here
        warnings.warn(
            f"Precision strings such as precision='luq4' are not available in {namespace.root}: "
            f"{type(error).__name__}: {error}. This version of Lightning is newer than lightning_eff knows. Use "
            "plugins=[lightning_eff.precision.LUQPrecision()] or "
            "callbacks=[lightning_eff.callbacks.LowPrecision('luq4')], which need no string.",
            FallbackWarning,
            stacklevel=2,
        )


def _register_cli_type() -> None:
    try:
        register_with_jsonargparse()
    except Exception as error:  # noqa: BLE001 - the user's import of jsonargparse must go on
        warnings.warn(
            f"LightningCLI will not accept precision strings such as 'luq4': {type(error).__name__}: {error}. "
            "In YAML use plugins: lightning_eff.precision.LUQPrecision",
            FallbackWarning,
            stacklevel=2,
        )


_ACTIONS: dict[str, tuple[str, Callable[[], None]]] = {
    namespace.entry_module: (namespace.entry_class, functools.partial(patch_namespace, namespace))
    for namespace in NAMESPACES
}
_ACTIONS["jsonargparse"] = ("ArgumentParser", _register_cli_type)
"""Module to wait for -> (a name it has once it has run, what to do then)."""


class _PostImportFinder:
    """Finds nothing itself; adds an action to the end of the import of a few modules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _ACTIONS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            _run_afterwards(spec.loader, _ACTIONS[name][1])
        return spec


def _run_afterwards(loader: Any, action: Callable[[], None]) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        action()

    loader.exec_module = exec_module


def install() -> None:
    """Patch the namespaces that are imported and arrange for the others; imports none and may be called again."""
    for module, (attribute, action) in _ACTIONS.items():
        if hasattr(sys.modules.get(module), attribute):
            action()
    if not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())


def status() -> dict[str, str]:
    """Import every installed namespace and return root -> ``"ready"``, ``"not installed"`` or ``"not patched"``."""
    found = {}
    for namespace in NAMESPACES:
        try:
            connector = importlib.import_module(namespace.connector_module)
            importlib.import_module(namespace.entry_module)
        except ImportError as error:
            absent = error.name == namespace.root.partition(".")[0]
            found[namespace.root] = "not installed" if absent else f"cannot be imported: {error}"
            continue
        patched = is_patched(getattr(connector, namespace.connector_class, type(None)))
        found[namespace.root] = "ready" if patched else "not patched: use plugins=[...] or the LowPrecision callback"
    return found
