"""Recorded micro-batch times as a CSV file: one row per micro-batch, readable by any table program.

    step,rank,micro_batch,seconds,other_s
    0,0,0,0.0312,0.0041
    0,0,1,0.0309,
    0,1,0,0.0518,
    ...

``seconds`` is what the micro-batch took. ``other_s``, the seconds of the step outside the micro-batch loop (T^c), stands
in one row of each step; without the column it is 0. The order of rows and columns is free. Numbers are written so that
they are read back to the last bit.

A run that was killed leaves a torn last line and an unfinished last step: both are left out. A step whose ranks all have
the same fewer micro-batches is the short end of an epoch and is left out too. Any other gap is an error.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from lightning_eff.errors import ConfigurationError, nearest
from lightning_eff.functional.dropcompute import Timings, check_timings

REQUIRED = ("step", "rank", "micro_batch", "seconds")
COLUMNS = (*REQUIRED, "other_s")


def write_timings(
    path: str | PathLike[str],
    table: Tensor,
    other: Tensor | float = 0.0,
    *,
    first_step: int = 0,
    append: bool = False,
) -> None:
    """Write the times of some steps.

    Args:
        path: the CSV file; its folder exists.
        table: seconds of every micro-batch, (steps, ranks, micro-batches).
        other: seconds of every step outside the loop, (steps,), or a number.
        first_step: number of the table's first step in the file.
        append: add to the file (which starts with a header if it is new) instead of replacing it.

    Raises:
        ConfigurationError: the table is not one of finite times.
    """
    timings = check_timings(table, other)
    path = Path(path)
    header = not append or not path.exists() or path.stat().st_size == 0
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if header:
            writer.writerow(COLUMNS)
        writer.writerows(_rows(timings, first_step))


def _rows(timings: Timings, first_step: int) -> Iterator[tuple[int | str, ...]]:
    for step, (ranks, other_s) in enumerate(
        zip(timings.table.tolist(), timings.other.tolist(), strict=True), first_step
    ):
        for rank, times in enumerate(ranks):
            for micro_batch, seconds in enumerate(times):
                once = repr(other_s) if rank == micro_batch == 0 else ""
                yield step, rank, micro_batch, repr(seconds), once


def read_timings(path: str | PathLike[str]) -> Timings:
    """Read the complete steps of a file, in the order of their numbers.

    Returns:
        ``(table, other)``: float64 (steps, ranks, micro-batches) and (steps,).

    Raises:
        ConfigurationError: there is no such file, or it is not of this format; the line, or the step, is named.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The timings {str(path)!r} cannot be read: {error}.") from error
    # A line without its newline was not written to its end, however well its beginning reads.
    lines = text.splitlines()[: None if text.endswith("\n") else -1]
    if not lines:
        raise ConfigurationError(f"{path} holds no complete line; its first is {','.join(COLUMNS)}.")
    columns = _columns(next(csv.reader(lines[:1])), path)
    cells = _Cells(path)
    for number, row in enumerate(csv.reader(lines[1:]), start=2):
        if row:
            cells.add(number, row, columns)
    return cells.timings()


def _columns(header: list[str], path: Path) -> dict[str, int]:
    names = [name.strip() for name in header]
    for name in names:
        if name not in COLUMNS or names.count(name) > 1:
            what = "twice" if name in COLUMNS else "not known"
            hint = "" if name in COLUMNS else nearest(name, COLUMNS)
            raise ConfigurationError(f"{path}, line 1: column {name!r} is {what}.{hint} Columns: {', '.join(COLUMNS)}.")
    if missing := [name for name in REQUIRED if name not in names]:
        raise ConfigurationError(f"{path}, line 1: no column {', '.join(missing)}; got {', '.join(names)}.")
    return {name: names.index(name) for name in names}


@dataclass
class _Cells:
    """What the rows read so far say."""

    path: Path
    seconds: dict[int, dict[tuple[int, int], float]] = field(default_factory=dict)
    other: dict[int, float] = field(default_factory=dict)

    def add(self, number: int, row: list[str], columns: dict[str, int]) -> None:
        """Take in one row; ``number`` is its line."""
        if len(row) != len(columns):
            raise ConfigurationError(f"{self.path}, line {number}: {len(row)} values for {len(columns)} columns.")
        step, rank, micro_batch = (self._index(number, name, row[columns[name]]) for name in REQUIRED[:3])
        cells = self.seconds.setdefault(step, {})
        if (rank, micro_batch) in cells:
            raise ConfigurationError(
                f"{self.path}, line {number}: step {step}, rank {rank}, micro-batch {micro_batch} a second time."
            )
        cells[rank, micro_batch] = self._time(number, "seconds", row[columns["seconds"]])
        if "other_s" in columns and (given := row[columns["other_s"]].strip()):
            if step in self.other:
                raise ConfigurationError(f"{self.path}, line {number}: other_s of step {step} a second time.")
            self.other[step] = self._time(number, "other_s", given)

    def _index(self, number: int, name: str, given: str) -> int:
        if not given.strip().isdecimal():
            raise ConfigurationError(f"{self.path}, line {number}: {name} {given!r} is not a whole number, 0 or more.")
        return int(given)

    def _time(self, number: int, name: str, given: str) -> float:
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise ConfigurationError(f"{self.path}, line {number}: {name} {given!r} is not a time, 0 or more seconds.")
        return value

    def timings(self) -> Timings:
        """The complete steps; a ConfigurationError for a gap that neither an end of epoch nor of the run explains."""
        shapes = {
            step: (1 + max(r for r, _ in cells), 1 + max(m for _, m in cells)) for step, cells in self.seconds.items()
        }
        if not shapes:
            raise ConfigurationError(f"{self.path} holds no row of timings.")
        full = {step: shape for step, shape in shapes.items() if len(self.seconds[step]) == math.prod(shape)}
        ranks, micro_batches = max(full.values() or shapes.values(), key=Counter(full.values()).__getitem__)
        whole = [step for step in sorted(shapes) if self._is_whole(step, shapes[step], (ranks, micro_batches))]
        if not whole:
            raise ConfigurationError(f"{self.path} holds no complete step.")
        table = [[[self.seconds[i][n, m] for m in range(micro_batches)] for n in range(ranks)] for i in whole]
        if self.other and (without := [step for step in whole if step not in self.other]):
            raise ConfigurationError(f"{self.path}: step {without[0]} has no other_s, and other steps have.")
        other = torch.tensor([self.other.get(step, 0.0) for step in whole], dtype=torch.float64)
        return check_timings(torch.tensor(table, dtype=torch.float64), other)

    def _is_whole(self, step: int, shape: tuple[int, int], usual: tuple[int, int]) -> bool:
        """Whether a step belongs in the table; a ConfigurationError if it should and has gaps."""
        cells = self.seconds[step]
        if shape == usual and len(cells) == math.prod(shape):
            return True
        short_end = shape[0] == usual[0] and shape[1] < usual[1] and len(cells) == math.prod(shape)
        if short_end or step == max(self.seconds):
            return False
        if shape[0] > usual[0] or shape[1] > usual[1]:
            raise ConfigurationError(
                f"{self.path}: step {step} has {shape[0]} ranks with {shape[1]} micro-batches, most steps have "
                f"{usual[0]} with {usual[1]}."
            )
        gap = next((n, m) for n in range(usual[0]) for m in range(usual[1]) if (n, m) not in cells)
        raise ConfigurationError(
            f"{self.path}: step {step} has no rank {gap[0]}, micro-batch {gap[1]}. Timings are recorded without "
            "dropping (threshold inf)."
        )
