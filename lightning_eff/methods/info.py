"""What is known about one method before any of its code is imported."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_eff.methods.state import Record, read_state

__all__ = ["MethodInfo", "row"]

_MODULES = {"precision": "precision", "strategy": "strategies", "callback": "callbacks"}
"""kind -> module of the public classes."""


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """What is known about one method before any of its code is imported.

    Attributes:
        name: the string a user writes, lower case.
        kind: where the string goes: ``Trainer(precision=...)``, ``Trainer(strategy=...)`` or a callback.
        class_name: the public class, found in ``lightning_eff``, in :attr:`module` and in
            ``lightning_eff.pytorch_lightning``.
        family: what the method is about, the room of its mathematics: numerics, stragglers, staleness.
        mixin: ``"module:Mixin"`` of the Lightning-free mixin the public classes are made from.
        options: what the string means: options of the class and their values.
        summary: one sentence for people.
        paper: authors, title, venue, year, address; empty (``papers.OURS``) where the method is this package's own.
        arguments: what is written between the brackets of the class in an example, where it cannot do without.
        composes_with: Lightning precisions allowed after ``+`` (``"luq4+bf16-mixed"``); the first is the default.
        strategies: strategy families the method has been shown to work with.
        conflicts: what is refused, with the reason.
        state: what the method keeps in a checkpoint: keys, types and ranges.
        metrics: logged key -> meaning and unit.
    """

    name: str
    kind: Literal["precision", "strategy", "callback"]
    family: str
    class_name: str
    mixin: str
    summary: str
    paper: str
    arguments: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    composes_with: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    conflicts: Mapping[str, str] = field(default_factory=dict)
    state: Record = field(default_factory=lambda: Record({}))
    metrics: Mapping[str, str] = field(default_factory=dict)

    def load_mixin(self) -> type[Any]:
        """Import and return the mixin class."""
        module, _, attribute = self.mixin.partition(":")
        mixin: type[Any] = getattr(importlib.import_module(module), attribute)
        return mixin

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Keys the method adds to its part of a checkpoint."""
        return tuple(self.state.keys)

    def read_state(self, state: Any, *, known: Collection[str] = ()) -> dict[str, Any]:
        """Return the method's part of a checkpoint as plain values; nothing is changed anywhere.

        Args:
            state: what the checkpoint has.
            known: keys in it that belong to somebody else (a base class, a subclass).

        Raises:
            CheckpointError: a key is missing or holds what is not allowed.
        """
        return read_state(self.state, state, of=self.name, remove=self.remove_state, known=known)

    @property
    def remove_state(self) -> str:
        """The statement that takes the method's state out of a loaded ``checkpoint``, for errors."""
        place = f"['callbacks']['{self.class_name}']" if self.kind == "callback" else f"['{self.class_name}']"
        return f"del checkpoint{place}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: a plugin that is sent to another process finds the row there."""
        return row, (self.name,)

    @property
    def module(self) -> str:
        """The module that has the public class for ``lightning.pytorch``."""
        return f"lightning_eff.{_MODULES[self.kind]}"

    @property
    def usage(self) -> str:
        """What a user writes between the brackets of ``Trainer(...)``.

        Example:
            >>> from lightning_eff.methods import METHODS
            >>> METHODS["luq4"].usage, METHODS["luq_fine_tuning"].usage
            ('precision="luq4"', 'callbacks=[LUQFineTuning(steps=300)]')
        """
        if self.kind == "callback":
            return f"callbacks=[{self.class_name}({self.arguments})]"
        return f'{self.kind}="{self.name}"'

    @property
    def strings(self) -> tuple[str, ...]:
        """Every string a user may write for this method.

        Example:
            >>> from lightning_eff.methods import METHODS
            >>> METHODS["luq4"].strings[:2]
            ('luq4', 'luq4+32-true')
        """
        return (self.name, *(f"{self.name}+{other}" for other in self.composes_with))


ROWS: dict[str, MethodInfo] = {}
"""Name -> row; the package fills it when it is imported."""


def row(name: str) -> MethodInfo:
    """Return the row of a method (unpickling)."""
    return ROWS[name]
