"""Write what follows from the rows of the methods: ``python tests/faces.py`` (``--check`` writes nothing).

Public classes are made when they are first asked for, so type checkers and editors see none of them. What they see
instead, the name of every class in ``__all__`` and the table of methods in the README are written here, from
``lightning_eff/methods``, between the two marks of each file. ``tests/test_faces.py`` holds them current.
"""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 120
FUNCTIONS = {"bf16_updates": "lightning_eff.optim"}
"""Public names of ``lightning_eff`` that are no methods -> where they are."""
OTHERS = ("METHODS", "MethodInfo", "__version__")
"""What ``lightning_eff`` has without asking anybody."""
AT_ODDS = {("pytorch_lightning", "precision"), ("pytorch_lightning", "strategy")}
"""Namespace and kind of classes whose mixin and base mypy finds at odds: take out what agrees by now.

Mixins are typed for ``lightning.pytorch``, whose classes are others than those of ``pytorch_lightning``.
"""


LOOSE = """# A mixin is typed for one Lightning and stands in front of the classes of each: "incompatible base classes".
# mypy: disable-error-code="misc"
"""


class Base(NamedTuple):
    """The class of a Lightning namespace that public classes of one kind are built on."""

    module: str
    name: str


BASES = {
    "precision": Base("plugins", "Precision"),
    "strategy": Base("strategies", "DDPStrategy"),
    "callback": Base("callbacks", "Callback"),
}


def rows() -> list[Any]:
    """Every row, without those that tests have added."""
    parts = (
        importlib.import_module(f"lightning_eff.methods.{name}") for name in ("precision", "strategies", "callbacks")
    )
    return [row for part in parts for row in part.ROWS]


def by_class(found: Sequence[Any]) -> list[list[Any]]:
    """Rows that share a class, together."""
    return [list(group) for _, group in groupby(found, lambda row: row.class_name)]


# ------------------------------------------------------------------------------------------------------ Python files


def names_list(names: Sequence[str], start: str) -> str:
    """A list of names in ruff's order: constants, classes, the rest."""
    in_order = sorted(names, key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name))
    return f"{start}[\n" + "".join(f'    "{name}",\n' for name in in_order) + "]\n"


def import_of(module: str, names: Sequence[str]) -> str:
    """An import statement inside ``if TYPE_CHECKING``, its names in ruff's order: classes first, without case."""
    names = sorted(names, key=lambda name: (name[0].islower(), name.lower()))
    line = f"    from {module} import {', '.join(names)}\n"
    if len(line) <= WIDTH + 1:
        return line
    return f"    from {module} import (\n" + "".join(f"        {name},\n" for name in names) + "    )\n"


def docstring(group: Sequence[Any]) -> str:
    """What a class does: the summary of its row; with several, what each of the others is."""
    first, *others = group
    if not others:
        return f'        """{first.summary}"""\n'
    said = [f"With {options(row, '``{}={}``')}: {row.summary}" for row in others]
    indented = [textwrap.fill(line, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12) for line in said]
    return f'        """{first.summary}\n\n' + "\n".join(indented) + '\n        """\n'


def options(row: Any, form: str) -> str:
    """The options that a string stands for."""
    return ", ".join(
        form.format(name, f'"{value}"' if isinstance(value, str) else value) for name, value in row.options.items()
    )


def stubs(kinds: Sequence[str], root: str) -> str:
    """``if TYPE_CHECKING``: the classes of these kinds in one namespace; then their names."""
    groups = [group for group in by_class(rows()) if group[0].kind in kinds]
    mixins = sorted(group[0].mixin.split(":") for group in groups)
    loose = any((root, kind) in AT_ODDS for kind in kinds)
    text = LOOSE if loose else ""
    text += "if TYPE_CHECKING:\n"
    for base in sorted(BASES[kind] for kind in kinds):
        text += import_of(f"{root}.{base.module}", [base.name])
    text += "\n" + "".join(import_of(module, [name]) for module, name in mixins)
    for group in groups:
        row = group[0]
        mixin = row.mixin.partition(":")[2]
        text += f"\n    class {row.class_name}({mixin}, {BASES[row.kind].name}):\n{docstring(group)}"
    return text + "\n\n" + names_list([group[0].class_name for group in groups], "__all__ = ")


def front_door() -> str:
    """``if TYPE_CHECKING``: every public class and where it is; then the names."""
    homes: dict[str, set[str]] = {}
    for row in rows():
        homes.setdefault(row.module, set()).add(row.class_name)
    for name, module in FUNCTIONS.items():
        homes.setdefault(module, set()).add(name)
    text = "if TYPE_CHECKING:\n" + "".join(import_of(module, list(homes[module])) for module in sorted(homes))
    names = [*OTHERS, *(name for found in homes.values() for name in found)]
    functions = "".join(f'    "{name}": "{module}",\n' for name, module in sorted(FUNCTIONS.items()))
    return f"{text}\n    __version__: str\n\n{names_list(names, '__all__ = ')}\n_FUNCTIONS = {{\n{functions}}}\n"


# ------------------------------------------------------------------------------------------------------------ README


def table() -> str:
    """One line for each class: what to write, what it does, where it comes from, its cards."""
    head = "| write | class | what it does | paper | card |\n| --- | --- | --- | --- | --- |\n"
    return head + "".join(f"| {' | '.join(cells(group))} |\n" for group in by_class(rows()))


def cells(group: Sequence[Any]) -> Iterator[str]:
    """The cells of one line."""
    first = group[0]
    several = len(group) > 1
    strings = ", ".join(f"`{row.name if row.kind == 'precision' else row.usage}`" for row in group)
    bases = ", ".join(f"`+{base}`" for base in first.composes_with)
    yield strings + (f"; {'each also ' if several else 'also '}{bases}" if bases else "")
    chosen = "<br>".join(f"`{row.class_name}({options(row, '{}={}')})`" for row in group)
    yield chosen if first.options else f"`{first.class_name}`"
    yield "<br>".join(f"`{row.name}`: {row.summary}" for row in group) if several else first.summary
    yield ", ".join(dict.fromkeys(cited(row.paper) for row in group))
    yield ", ".join(f"[{row.name}](lightning_eff/cards/{row.name}.md)" for row in group)


PAPER = re.compile(
    r"(?P<author>[^,:]+?)(?P<others>,[^:]*| et al\.)?: .*[.)] (?P<where>[^.]*\d{4})\. (?P<address>https?://\S+)"
)


def cited(paper: str) -> str:
    """``[Chmiel et al., ICLR 2023](https://...)``, of authors, title, venue, year, address."""
    if not paper:
        return "none"
    found = PAPER.fullmatch(paper)
    if found is None:
        raise ValueError(f"Not 'authors: title. venue year. address': {paper}")
    authors = found["author"] + (" et al." if found["others"] else "")
    return f"[{authors}, {found['where']}]({found['address']})"


# ------------------------------------------------------------------------------------------------------------- files

FACES: dict[str, Callable[[], str]] = {
    "lightning_eff/__init__.py": front_door,
    "lightning_eff/precision/__init__.py": lambda: stubs(["precision"], "lightning.pytorch"),
    "lightning_eff/strategies/__init__.py": lambda: stubs(["strategy"], "lightning.pytorch"),
    "lightning_eff/callbacks/__init__.py": lambda: stubs(["callback"], "lightning.pytorch"),
    "lightning_eff/pytorch_lightning.py": lambda: stubs(["precision", "strategy", "callback"], "pytorch_lightning"),
    "README.md": table,
}
MARKS = {
    ".py": ("# ---- written by tests/faces.py from the rows of the methods\n", "# ---- end of what is written\n"),
    ".md": ("<!-- written by tests/faces.py from the rows of the methods -->\n", "<!-- end of what is written -->\n"),
}


def current(name: str) -> tuple[str, str]:
    """A file as it is and as it has to be."""
    text = (ROOT / name).read_text(encoding="utf-8")
    begin, end = MARKS[Path(name).suffix]
    before, _, rest = text.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"{name} lacks {begin.strip()!r} and {end.strip()!r}")
    return text, f"{before}{begin}{FACES[name]()}{end}{after}"


def main(arguments: Sequence[str]) -> int:
    """Write the files that are not current, or with ``--check`` name them; 1 if there were any to name."""
    stale = []
    for name in FACES:
        text, wanted = current(name)
        if text != wanted:
            stale.append(name)
            if "--check" not in arguments:
                (ROOT / name).write_text(wanted, encoding="utf-8")
    print(f"{'not current' if '--check' in arguments else 'written'}: {', '.join(stale) or 'nothing'}")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
