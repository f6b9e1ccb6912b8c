"""The tests keep rules of their own: none imports another one, files are short, markers are known."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.import_graph import code_lines

TESTS = Path(__file__).resolve().parent
SOURCES = {file.relative_to(TESTS).as_posix(): file.read_text(encoding="utf-8") for file in sorted(TESTS.rglob("*.py"))}
MAX_CODE_LINES = 300
OF_PYTEST = {"parametrize", "skip", "skipif", "xfail", "usefixtures", "filterwarnings", "timeout"}


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
    long = {name: source for name, source in SOURCES.items() if source.count("\n") > MAX_CODE_LINES}
    assert {name for name, source in long.items() if code_lines(source) > MAX_CODE_LINES} == set()


def test_no_test_imports_another() -> None:
    """What several share is in a module of its own."""
    assert {name for name, source in SOURCES.items() if list(imported_tests(source))} == set()


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
    assert markers("import pytest\nLONG = pytest.mark.long\n@pytest.mark.slow(1)\ndef f(): ...") == {"long", "slow"}
