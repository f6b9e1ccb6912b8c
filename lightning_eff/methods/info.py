"""What is known about one method before any of its code is imported."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["MethodInfo"]


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """What is known about one method before any of its code is imported.

    Attributes:
        name: the string a user writes, lower case.
        kind: where the string goes: ``Trainer(precision=...)``, ``Trainer(strategy=...)`` or a callback.
        class_name: the public class, found in ``lightning_eff.<kind>`` and ``lightning_eff.pytorch_lightning``.
        shell: ``"module:Mixin"`` of the Lightning-free mixin the public classes are made from.
        summary: one sentence for people.
        paper: authors, title, venue, year, address.
        composes_with: Lightning precisions allowed after ``+`` (``"luq4+bf16-mixed"``); the first is the default.
        strategies: strategy families the method has been shown to work with.
        conflicts: what is refused, with the reason.
        state_keys: keys the method adds to its part of a checkpoint.
        metrics: logged key -> meaning and unit.
    """

    name: str
    kind: Literal["precision", "strategy", "callback"]
    class_name: str
    shell: str
    summary: str
    paper: str
    composes_with: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    conflicts: Mapping[str, str] = field(default_factory=dict)
    state_keys: tuple[str, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict)

    def load_shell(self) -> type[Any]:
        """Import and return the mixin class."""
        module, _, attribute = self.shell.partition(":")
        shell: type[Any] = getattr(importlib.import_module(module), attribute)
        return shell

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: a plugin that is sent to another process finds the row there."""
        return _row, (self.name,)

    @property
    def strings(self) -> tuple[str, ...]:
        """Every string a user may write for this method.

        Example:
            >>> from lightning_eff.methods import METHODS
            >>> METHODS["luq4"].strings[:2]
            ('luq4', 'luq4+32-true')
        """
        return (self.name, *(f"{self.name}+{other}" for other in self.composes_with))


def _row(name: str) -> MethodInfo:
    from lightning_eff.methods import METHODS

    return METHODS[name]
