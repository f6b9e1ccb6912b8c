"""``python -m lightning_eff``: list the methods, explain one, look at this machine, run an untouched project."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from lightning_eff.errors import EffError, UnknownMethodError, nearest
from lightning_eff.integration.lazy import status
from lightning_eff.integration.script import check_target, run_script
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.runtime import figures

WIDTH = 120
"""Columns where the output is no terminal and ``COLUMNS`` is not set."""
_PACKAGES = ("lightning-eff", "torch", "lightning", "pytorch-lightning", "torchmetrics", "jsonargparse", "hydra-core")


def list_methods(console: Console) -> None:
    """Print one row per method: what to write, what it does."""
    table = Table("write", "class", "what it does", title="Methods of lightning_eff", title_justify="left")
    for info in METHODS.values():
        table.add_row(info.usage, info.class_name, info.summary)
    console.print(table)
    console.print("More about one of them: python -m lightning_eff explain NAME", highlight=False)


def explain(console: Console, name: str) -> None:
    """Print everything the row of a method says, then its card.

    Raises:
        UnknownMethodError: there is no such method or class; the nearest is named.
    """
    known = {info.class_name.lower(): info for info in reversed(list(METHODS.values()))} | dict(METHODS)
    info = known.get(name.lower().partition("+")[0])
    if info is None:
        classes = {info.class_name.lower(): info.class_name for info in METHODS.values()}
        hint = nearest(name.lower(), [*METHODS, *classes])
        for lower, written in classes.items():
            hint = hint.replace(repr(lower), repr(written))
        raise UnknownMethodError(f"No method {name!r}.{hint} Known: {', '.join(METHODS)}; class names do as well.")
    table = Table.grid(padding=(0, 2))
    for label, value in _facts(info):
        table.add_row(label, value)
    console.print(table)
    card = Path(__file__).parent / "cards" / f"{info.name}.md"
    if card.is_file():
        console.print(Markdown(card.read_text(encoding="utf-8")))


def _facts(info: MethodInfo) -> list[tuple[str, str]]:
    return [
        ("method", f"{info.name}: {info.summary}"),
        ("write", info.usage),
        ("strings", ", ".join(info.strings) if info.kind != "callback" else "none"),
        ("class", f"{info.module}.{info.class_name}, lightning_eff.pytorch_lightning.{info.class_name}"),
        ("strategies", ", ".join(info.strategies) or "any"),
        *(("refused", f"{what}: {why}") for what, why in info.conflicts.items()),
        *(("logged", f"{key}: {meaning}") for key, meaning in info.metrics.items()),
        ("in checkpoints", ", ".join(info.state_keys) or "nothing"),
        ("paper", info.paper or "none: the method is this package's own"),
    ]


def doctor(console: Console) -> None:
    """Print what this machine has: versions, whether each Lightning knows the strings, which fast paths run."""
    table = Table.grid(padding=(0, 2))
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        table.add_row(package, _version(package))
    for root, state in status().items():
        table.add_row(f"strings in {root}", state)
    for what, state in importlib.import_module("lightning_eff.kernels").describe().items():
        # The name of a folder is no markup and perhaps no text.
        table.add_row(what, Text(state.encode(errors="backslashreplace").decode()))
    console.print(table)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lightning_eff", description=__doc__)
    parser.add_argument("--version", action="version", version=f"lightning-eff {_version('lightning-eff')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the methods, one line each")
    commands.add_parser("explain", help="all that is known about one method").add_argument(
        "method", help="its name, or that of its class"
    )
    commands.add_parser("doctor", help="versions, Lightning namespaces and fast paths on this machine")
    plan = commands.add_parser("plan", help="predict step time, drop rate and speed-up before training")
    plan.add_argument("method", help="dropcompute")
    plan.add_argument("arguments", nargs=argparse.REMAINDER, help="of its planner; --help lists them")
    run = commands.add_parser("run", help="run a script with the strings registered, nothing in it changed")
    run.add_argument("-m", dest="as_module", action="store_true", help="the target is a module, as in python -m")
    run.add_argument("target", help="script (or module with -m)")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the script")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    options = _parser().parse_args(argv)
    console = figures.console(WIDTH)
    try:
        if options.command == "run":
            check_target(options.target, as_module=options.as_module)
        elif options.command == "list":
            list_methods(console)
        elif options.command == "plan":
            return int(importlib.import_module("lightning_eff.plan").main(options.method, options.arguments))
        elif options.command == "explain":
            explain(console, options.method)
        else:
            doctor(console)
    except EffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.command == "run":  # outside the handler: the script's own errors keep their traceback
        run_script(options.target, options.arguments, as_module=options.as_module)
    return 0


if __name__ == "__main__":
    sys.exit(main())
