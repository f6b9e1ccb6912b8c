"""One row per method: what is said about a method more than once is said here.

The registry of strings, the compatibility check, ``python -m lightning_eff explain``, the public names, the table in
the README (written from the rows by ``tests/faces.py``) and the test batteries all read them. This part imports nothing
but the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lightning_eff.methods import callbacks, precision, strategies
from lightning_eff.methods.info import ROWS, MethodInfo

__all__ = ["METHODS", "MethodInfo"]

ROWS.update({info.name: info for info in (*precision.ROWS, *strategies.ROWS, *callbacks.ROWS)})
METHODS: Mapping[str, MethodInfo] = MappingProxyType(ROWS)
