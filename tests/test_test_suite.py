"""The tests keep rules of their own: none imports another one, files are short, markers are known."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SOURCES = {file.relative_to(TESTS).as_posix(): file.read_text(encoding="utf-8") for file in sorted(TESTS.rglob("*.py"))}
MAX_CODE_LINES = 300
OF_PYTEST = {"parametrize", "skip", "skipif", "xfail", "usefixtures", "filterwarnings", "timeout"}

# Files that are still to be split, and imports still to be moved to helpers. Both lists only shrink.
TOO_LONG: set[str] = {
    "functional/numerics/test_flexpoint.py",
    "kernels/test_cache.py",
    "optim/test_bf16.py",
    "strategies/pipelined_bp/test_lightning.py",
    "strategies/test_lifetimes.py",
}
IMPORTS_A_TEST: set[str] = {
    "callbacks/gradients/test_statistics.py",
    "functional/staleness/test_directions.py",
    "functional/stragglers/test_simulated.py",
    "kernels/test_float_format.py",
    "plan/test_dropcompute.py",
    "precision/formats/test_fp8_scalings.py",
    "precision/test_battery.py",
    "precision/test_bf16.py",
    "precision/test_fitted.py",
    "strategies/dropcompute/test_faults.py",
    "strategies/dropcompute/test_lightning.py",
    "strategies/dropcompute/test_loop.py",
    "strategies/dropcompute/test_resume.py",
    "strategies/pipelined_bp/test_hooks.py",
    "strategies/pipelined_bp/test_profiling.py",
    "strategies/test_ranks_lost.py",
}


def code_lines(source: str) -> int:
    """Lines that hold code: no comments, no blank ones, no docstrings."""
    texts = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for token in tokens if token.type not in no_code for line in range(token.start[0], token.end[0] + 1)}
    return len(code - texts)


def imported_tests(source: str) -> Iterator[str]:
    """The test modules that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if any(
                part.startswith("test_") and TESTS.joinpath(*parts[1:i], f"{part}.py").exists()
                for i, part in enumerate(parts)
            ):
                yield name


def markers(source: str) -> set[str]:
    """The names after ``pytest.mark.``."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark"
    }


def test_no_file_is_long() -> None:
    """And those that were put right leave the list."""
    long = {name: source for name, source in SOURCES.items() if source.count("\n") > MAX_CODE_LINES}
    assert {name for name, source in long.items() if code_lines(source) > MAX_CODE_LINES} == TOO_LONG


def test_no_test_imports_another() -> None:
    """What several share is in a module of its own. And those that were put right leave the list."""
    assert {name for name, source in SOURCES.items() if list(imported_tests(source))} == IMPORTS_A_TEST


def test_markers_are_known(request: pytest.FixtureRequest) -> None:
    """Also those that a deselected test has."""
    ours = {line.split(":")[0] for line in request.config.getini("markers")}
    unknown = {name: markers(source) - ours - OF_PYTEST for name, source in SOURCES.items()}
    assert {name: found for name, found in unknown.items() if found} == {}


def test_the_checker_sees_what_is_wrong() -> None:
    assert list(imported_tests("def f():\n    from tests.test_methods import x")) == ["tests.test_methods.x"]
    assert list(imported_tests("from tests import test_methods")) == ["tests.test_methods"]
    assert list(imported_tests("import tests.precision.test_fp8 as other")) == ["tests.precision.test_fp8"]
    assert list(imported_tests("from tests.precision import models, exact")) == []
    assert code_lines('"""Text."""\n\n# a remark\nx = (\n    1\n)\n\n\ndef f():\n    """More\n    text."""\n') == 4
    assert markers("import pytest\nLONG = pytest.mark.long\n@pytest.mark.slow(1)\ndef f(): ...") == {"long", "slow"}
