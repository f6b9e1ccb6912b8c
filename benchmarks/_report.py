"""What every benchmark prints and keeps: one table, one JSON line per pair, one file that names the machine."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._stats import Spread

__all__ = ["Report", "Row", "add_common_arguments", "machine"]

RESULTS = Path(__file__).parent / "results"
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "i8mm")
PACKAGES = ("lightning-eff", "torch", "lightning", "qtorch", "brevitas", "torchao")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--check``, ``--results`` and ``--device``."""
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a target is missed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cuda: CUDA events and peak memory; written for a first run on a GPU, none of its targets is calibrated",
    )


@dataclass(frozen=True)
class Row:
    """One compared pair.

    Attributes:
        settings: what was measured: model, size, threads and the like.
        pair: ``"ours / base"`` in words.
        value: the compared figure.
        unit: unit of ``value``; empty for a ratio.
        target: the largest value that passes, or None where no target is set.
        details: further figures, such as seconds per step.
    """

    settings: dict[str, str | int]
    pair: str
    value: Spread
    unit: str = ""
    target: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool | None:
        """Whether the target is met; None without a target."""
        return None if self.target is None else self.value.median <= self.target

    def as_dict(self) -> dict[str, Any]:
        """Return what the JSON line holds."""
        return {**asdict(self), "ok": self.ok}


def _cpu_info() -> tuple[str, list[str]]:
    """Return the CPU's name and the instruction sets that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    name = re.search(r"model name\s*:\s*(.*)", text)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.*)", text)
    known = set(flags.group(1).split()) if flags else set()
    return name.group(1) if name else platform.machine(), [flag for flag in CPU_FLAGS if flag in known]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit measured, with ``+`` when the tree holds changes."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()


def machine() -> dict[str, Any]:
    """Return where and with what a figure was measured."""
    cpu, flags = _cpu_info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "flags": flags,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES if _version(name)},
        "commit": _commit(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m " + " ".join([_module_name(), *sys.argv[1:]]),
    }


def _module_name() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}".removesuffix(".__main__") if sys.argv[0] else "benchmarks"


class Report:
    """Collects rows, then prints and keeps them.

    Args:
        name: the benchmark; part of the file name.
        columns: the settings shown as columns of the table.
    """

    def __init__(self, name: str, columns: tuple[str, ...]) -> None:
        self.name, self.columns = name, columns
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def add(self, row: Row) -> None:
        """Keep a row and print its JSON line at once, so that an interrupted run leaves what it measured."""
        self.rows.append(row)
        print(json.dumps({"benchmark": self.name, **row.as_dict()}), flush=True)

    def note(self, text: str) -> None:
        """Keep a remark that belongs to the figures, such as a peer that could not run."""
        self.notes.append(text)

    def table(self) -> Table:
        """Return the rows for people."""
        table = Table(title=f"benchmarks.{self.name}")
        for column in (*self.columns, "pair", "median", "min..max", "target", ""):
            table.add_column(column, justify="right" if column in ("median", "min..max", "target") else "left")
        marks = {None: "", True: "ok", False: "MISSED"}
        for row in self.rows:
            value, unit = row.value, f" {row.unit}" if row.unit else ""
            cells = [str(row.settings.get(column, "")) for column in self.columns]
            cells += [row.pair, f"{value.median:.4g}{unit}", f"{value.low:.4g}..{value.high:.4g}"]
            table.add_row(*cells, "" if row.target is None else f"<= {row.target:g}", marks[row.ok])
        return table

    def save(self, options: argparse.Namespace) -> Path:
        """Write machine, options, rows and notes as ``<name>-<cpu>-<date and time, UTC>.json``."""
        where = machine()
        chip = where["gpu"] if options.device == "cuda" else where["cpu"]
        chip = re.sub(r"[^a-z0-9]+", "-", str(chip).lower()).strip("-")
        date = re.sub(r"[^0-9T]", "", where["date"][:19])
        folder: Path = options.results
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{chip}-{date}.json"
        rows = [row.as_dict() for row in self.rows]
        chosen = {name: value for name, value in vars(options).items() if name != "results"}
        content = {"machine": where, "options": chosen, "rows": rows, "notes": self.notes}
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path

    def finish(self, options: argparse.Namespace) -> int:
        """Print the table, keep the file and return the exit status."""
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(self.table())
        for note in self.notes:
            console.print(f"note: {note}", markup=False)
        console.print(f"saved {self.save(options)}", markup=False, soft_wrap=True)
        missed = [row for row in self.rows if row.ok is False]
        if missed:
            console.print(f"{len(missed)} target(s) missed", style="bold red")
        return 1 if options.check and missed else 0
