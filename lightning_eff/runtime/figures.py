"""Figures of a method: in the loggers, as often as the Trainer logs, and on the console."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from rich.console import Console

__all__ = ["console", "is_logged", "log_figures", "of_method"]


Value = TypeVar("Value")


def of_method(method: str, figures: Mapping[str, Value]) -> dict[str, Value]:
    """Return figures under the names they are logged by.

    Args:
        method: name of the method.
        figures: short name -> value.

    Example:
        >>> of_method("luq4", {"grad_zeros": 0.5})
        {'eff/luq4/grad_zeros': 0.5}
    """
    return {f"eff/{method}/{name}": value for name, value in figures.items()}


def is_logged(trainer: Any, step: int) -> bool:
    """Return whether the Trainer logs after ``step`` steps; with ``log_every_n_steps=0`` or barebones it never does.

    Args:
        trainer: Lightning's.
        step: optimizer steps made.
    """
    every = int(trainer.log_every_n_steps)
    return every > 0 and step % every == 0


def log_figures(trainer: Any, figures: Mapping[str, float], *, step: int | None = None) -> None:
    """Hand figures to every logger of the Trainer.

    Args:
        trainer: Lightning's.
        figures: name -> value.
        step: optimizer steps made; None for the Trainer's own count, which stands still where raw optimizers step.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(figures), step=trainer.global_step if step is None else step)


def console(width: int = 110) -> Console:
    """Return a console as wide as the terminal, or ``COLUMNS`` where it is set, or ``width`` columns in a log file."""
    found = Console()
    return found if found.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(width=width)
