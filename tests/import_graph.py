"""The package as its sources show it: which module imports which, how long files are, who reads whose private names.

``python -m tests.import_graph`` prints the figures.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "lightning_eff"

FLOORS = (
    ("errors",), ("checks",), ("methods",), ("functional",), ("kernels",), ("optim",), ("runtime",), ("integration",),
    ("precision", "strategies", "callbacks"), ("compose",), ("plan",), ("testing",), ("_run_script",), ("__main__",),
)  # fmt: skip
"""Parts from the lowest to the highest; a part imports itself and what is lower."""
FACADES = ("__init__", "pytorch_lightning")
"""They hold names alone, which load when they are used: no floor."""
INSIDE = {"precision": (("formats",), ("layers",), ("gradients", "method", "models", "plugin", "run"))}
"""Floors inside a part; what is not named is above them."""


def module_name(file: Path, package: Path = PACKAGE) -> str:
    """Return the dotted name of a source file."""
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources(package: Path = PACKAGE) -> Mapping[str, str]:
    """Return module name -> source of every module of the package."""
    return {module_name(file, package): file.read_text(encoding="utf-8") for file in sorted(package.rglob("*.py"))}


def import_graph(found: Mapping[str, str]) -> dict[str, set[str]]:
    """Return module -> modules it imports: anywhere in it, in functions and for the type checker too."""
    return {name: {m for m in _imported(ast.parse(text), found) if m != name} for name, text in found.items()}


def _imported(tree: ast.AST, known: Mapping[str, str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner
                elif node.module in known:
                    yield node.module


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or by way of others."""
    reach = {start: _reachable(graph, start) for start in graph}
    groups = {
        tuple(sorted(other for other in reach[start] if start in reach[other]))
        for start in graph
        if start in reach[start]
    }
    return sorted(map(list, groups))


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(graph[name])
    return seen


def _floor(module: str) -> tuple[int, int] | None:
    """Return (floor, floor inside the part); None for facades."""
    part, _, rest = module.partition(".")[2].partition(".")
    if not part or part in FACADES:
        return None
    level = next((i for i, parts in enumerate(FLOORS) if part in parts), -1)
    inside = INSIDE.get(part, ())
    if inside and not rest:  # the part's own face
        return None
    return level, next((i for i, names in enumerate(inside) if rest.partition(".")[0] in names), len(inside))


def upward_arrows(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the imports that point up, or across to a sibling."""
    found = []
    for name, targets in graph.items():
        for target in sorted(targets):
            mine, theirs = _floor(name), _floor(target)
            if mine is None or theirs is None:
                continue
            parts = name.split(".")[1], target.split(".")[1]
            across = theirs[0] == mine[0] and parts[0] != parts[1]
            if across or theirs[0] > mine[0] or (theirs[0] == mine[0] and theirs[1] > mine[1]):
                found.append(f"{name} -> {target}")
    return found


def arrows_between_strategies(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the imports from one strategy's folder into another's."""

    def folder(module: str) -> str:
        parts = module.split(".")
        return parts[2] if parts[1:2] == ["strategies"] and len(parts) > 3 else ""

    pairs = ((name, target) for name, targets in graph.items() for target in sorted(targets))
    return [f"{a} -> {b}" for a, b in pairs if folder(a) and folder(b) and folder(a) != folder(b)]


def code_lines(source: str) -> int:
    """Return how many lines of a source hold code: not blank, not a comment, not in a docstring."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                docs.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def private_names(source: str) -> set[str]:
    """Return the underscore attributes, methods and names that a source defines."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            found.add(node.attr)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(target.id for target in targets if isinstance(target, ast.Name))
    return {name for name in found if _is_private(name)}


def foreign_private_names(found: Mapping[str, str]) -> list[str]:
    """Return where a module reads or sets an underscore attribute that another module of the package defines."""
    defined = {name: private_names(text) for name, text in found.items()}
    everywhere = set().union(*defined.values())
    faults = []
    for module, text in found.items():
        for node in ast.walk(ast.parse(text)):
            name = _accessed(node)
            if name in everywhere - defined[module] - _THEIRS:
                faults.append(f"{module}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}")
    return faults


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_own(node: ast.AST) -> bool:
    """Whether an attribute of this is one's own: of ``self``, ``cls`` or ``super()``, which share a class."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _accessed(node: ast.AST) -> str:
    """Return the private name that an expression asks another object for, or nothing."""
    if isinstance(node, ast.Attribute) and _is_private(node.attr) and not _is_own(node.value):
        return node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_STRING:
        owner, name = (*node.args, None, None)[:2]
        text = name.value if isinstance(name, ast.Constant) else None
        if owner is not None and not _is_own(owner) and isinstance(text, str) and _is_private(text):
            return text
    return ""


_BY_STRING = ("getattr", "hasattr", "setattr", "delattr")
_THEIRS = frozenset(
    {"_replace", "_asdict", "_fields", "_version", "_values", "_buffers", "_parameters", "_modules", "_trainer"}
)
"""Of named tuples, tensors, modules and LightningModules, whoever has an attribute of that name besides."""


def figures(graph: Mapping[str, set[str]]) -> str:
    """Return the import graph in a line."""
    arrows = sum(map(len, graph.values()))
    return (
        f"import graph: {len(graph)} modules, {arrows} arrows, circles {len(circles(graph))}, "
        f"upward arrows {len(upward_arrows(graph))}, arrows between strategies {len(arrows_between_strategies(graph))}"
    )


if __name__ == "__main__":
    print(figures(import_graph(sources())))
