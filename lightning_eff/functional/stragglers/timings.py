"""Recorded micro-batch times as a CSV file: one row per micro-batch, readable by any table program.

    step,rank,micro_batch,seconds,other_s
    0,0,0,0.0312,0.0041
    0,0,1,0.0309,
    0,1,0,0.0518,
    ...

``seconds`` is what the micro-batch took. ``other_s``, the seconds of the step outside the micro-batch loop (T^c),
stands in one row of each step; without the column it is 0. The order of rows and columns is free. Numbers are written
so that they are read back to the last bit. Of a micro-batch that is given twice (a resumed run) the later row counts.

A run that was killed leaves a torn last line, one without a newline, and an unfinished last step: both are left out. A
step whose ranks all have the same fewer micro-batches is the short end of an epoch and is left out too. Any other gap
is an error.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from lightning_eff.errors import ConfigurationError, EffWarning, nearest
from lightning_eff.functional.stragglers.threshold import Timings, check_timings

REQUIRED = ("step", "rank", "micro_batch", "seconds")
COLUMNS = (*REQUIRED, "other_s")
_HEADER = ",".join(COLUMNS) + "\n"
_DIGITS = 15


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
        ConfigurationError: the table is not one of finite times, the file cannot be written, or rows are to be added to
            one that is something else.
    """
    timings = check_timings(table, other)
    path = Path(path)
    if append:
        check_target(path)
    try:
        kept = _cut_torn_line(path) if append and path.exists() else 0
        with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
            if not kept:
                file.write(_HEADER)
            file.writelines(_rows(timings, first_step))
    except OSError as error:
        raise ConfigurationError(f"The timings {str(path)!r} cannot be written: {error}.") from error


def append_timings(
    path: str | PathLike[str], table: Tensor, other: Tensor | float = 0.0, *, first_step: int = 0
) -> None:
    """Add the steps of a run that goes on whatever happens: an :class:`EffWarning` says what could not be written."""
    try:
        write_timings(path, table, other, first_step=first_step, append=True)
    except ConfigurationError as error:  # a disk that filled up must not end the run
        warnings.warn(f"{error} The run goes on, and these steps are missing there.", EffWarning, stacklevel=2)


def check_target(path: str | PathLike[str]) -> None:
    """Refuse a file that rows cannot be added to, before there are any: another file would lose its last line.

    Raises:
        ConfigurationError: its folder is not there, it is not a file, or it does not begin with the header.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigurationError(f"The timings {str(path)!r} cannot be written: there is no folder {path.parent}.")
    if not path.exists():
        return
    if not path.is_file():
        raise ConfigurationError(f"The timings {str(path)!r} cannot be written: that is not a file.")
    header = _HEADER.encode()
    try:
        with path.open("rb") as file:
            found = file.read(len(header))
    except OSError as error:
        raise ConfigurationError(f"The timings {str(path)!r} cannot be read: {error}.") from error
    if found != header[: len(found)]:
        raise ConfigurationError(
            f"Timings are not added to {str(path)!r}, which holds something else: its first line is not "
            f"{_HEADER.strip()}. Name another file, or remove that one."
        )


def _cut_torn_line(path: Path) -> int:
    """Cut off what stands behind the last newline, or rows added now would continue it; the bytes that are left."""
    with path.open("r+b") as file:
        return file.truncate(file.read().rfind(b"\n") + 1)


def _rows(timings: Timings, first_step: int) -> Iterator[str]:
    for i, (ranks, other_s) in enumerate(zip(timings.table.tolist(), timings.other.tolist(), strict=True)):
        for rank, times in enumerate(ranks):
            for micro_batch, seconds in enumerate(times):
                once = repr(other_s) if rank == micro_batch == 0 else ""
                yield f"{first_step + i},{rank},{micro_batch},{seconds!r},{once}\n"


def read_timings(path: str | PathLike[str]) -> Timings:
    """Read the complete steps of a file, in the order of their numbers.

    Returns:
        ``(table, other)``: float64 (steps, ranks, micro-batches) and (steps,).

    Raises:
        ConfigurationError: there is no such file, or it is not of this format; the line, or the step, is named.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except (OSError, ValueError) as error:  # ValueError: no text, or no path
        raise ConfigurationError(f"The timings {str(path)!r} cannot be read: {error}.") from error
    # A line without its newline was not written to its end, however well its beginning reads.
    lines = text.split("\n")[:-1]
    if not lines:
        raise ConfigurationError(f"{path} holds no complete line; the first is {','.join(COLUMNS)}.")
    columns = _columns(_values(lines[0]), path)
    cells = _Cells(path)
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            cells.add(number, _values(line), columns)
    return cells.timings()


def _values(line: str) -> list[str]:
    return [value.strip().strip('"') for value in line.split(",")]


def _columns(names: list[str], path: Path) -> dict[str, int]:
    for name in names:
        if name not in COLUMNS:
            hint = nearest(name, COLUMNS)
            raise ConfigurationError(f"{path}, line 1: unknown column {name!r}.{hint} Known: {', '.join(COLUMNS)}.")
    if missing := [name for name in REQUIRED if name not in names]:
        raise ConfigurationError(f"{path}, line 1: column {', '.join(missing)} is missing; got {', '.join(names)}.")
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{path}, line 1: a column stands there twice; got {', '.join(names)}.")
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
        cells[rank, micro_batch] = self._time(number, "seconds", row[columns["seconds"]])
        if "other_s" in columns and (given := row[columns["other_s"]]):
            self.other[step] = self._time(number, "other_s", given)

    def _index(self, number: int, name: str, given: str) -> int:
        if not given.isdecimal() or len(given) > _DIGITS:
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
        """Return the complete steps; refuse a gap that neither an end of epoch nor of the run explains."""
        if not self.seconds:
            raise ConfigurationError(f"{self.path} holds no row of timings.")
        full = Counter(self._shape(step) for step in self.seconds if self._is_full(step))
        ranks, micro_batches = full.most_common(1)[0][0] if full else self._shape(min(self.seconds))
        whole = [step for step in sorted(self.seconds) if self._is_whole(step, (ranks, micro_batches))]
        if not whole:
            raise ConfigurationError(f"{self.path} holds no complete step.")
        if self.other and (without := [step for step in whole if step not in self.other]):
            raise ConfigurationError(f"{self.path}: step {without[0]} has no other_s, and other steps have one.")
        table = [[[self.seconds[i][n, m] for m in range(micro_batches)] for n in range(ranks)] for i in whole]
        other = torch.tensor([self.other.get(step, 0.0) for step in whole], dtype=torch.float64, device="cpu")
        return check_timings(torch.tensor(table, dtype=torch.float64, device="cpu"), other)

    def _shape(self, step: int) -> tuple[int, int]:
        cells = self.seconds[step]
        return 1 + max(rank for rank, _ in cells), 1 + max(micro_batch for _, micro_batch in cells)

    def _is_full(self, step: int) -> bool:
        return len(self.seconds[step]) == math.prod(self._shape(step))

    def _is_whole(self, step: int, usual: tuple[int, int]) -> bool:
        """Whether a step belongs in the table; a ConfigurationError if it should and does not fit."""
        (ranks, micro_batches), full = self._shape(step), self._is_full(step)
        if full and (ranks, micro_batches) == usual:
            return True
        if ranks > usual[0] or micro_batches > usual[1]:
            raise ConfigurationError(
                f"{self.path}: step {step} has {ranks} ranks with {micro_batches} micro-batches, most steps have "
                f"{usual[0]} with {usual[1]}."
            )
        if step == max(self.seconds) or (full and ranks == usual[0]):
            return False
        gap = next((n, m) for n in range(usual[0]) for m in range(usual[1]) if (n, m) not in self.seconds[step])
        raise ConfigurationError(
            f"{self.path}: step {step} has no rank {gap[0]}, micro-batch {gap[1]}. Timings are recorded without "
            "dropping (threshold inf)."
        )
