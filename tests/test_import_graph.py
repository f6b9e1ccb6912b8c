"""No import circle, no arrow up, no file too long to read, nobody's private names in other hands."""

from __future__ import annotations

import re

import pytest

from tests.import_graph import (
    arrows_between_strategies,
    circles,
    code_lines,
    figures,
    foreign_private_names,
    import_graph,
    sources,
    upward_arrows,
)

MAX_CODE_LINES = 300
MAX_IGNORES = 20
GRAPH = import_graph(sources())
EFF = "lightning_eff."


def test_the_import_graph_has_no_circle_and_no_arrow_up() -> None:
    print(figures(GRAPH))
    assert circles(GRAPH) == []
    assert upward_arrows(GRAPH) == []
    assert arrows_between_strategies(GRAPH) == []


@pytest.mark.parametrize("module", GRAPH)
def test_a_file_has_at_most_300_lines_of_code(module: str) -> None:
    assert code_lines(sources()[module]) <= MAX_CODE_LINES, "split it by responsibility"


def test_the_type_checker_is_told_to_look_away_in_few_places_and_why() -> None:
    ignores = [comment for text in sources().values() for comment in re.findall(r"# type: ignore.*", text)]
    assert all(re.match(r"# type: ignore\[[a-z, -]+\]", comment) for comment in ignores)
    assert len(ignores) <= MAX_IGNORES


def test_nobody_reads_private_names_of_another_module() -> None:
    assert foreign_private_names(sources()) == []


# ------------------------------------------------------------------------------------------------- the checks bite


def _graph(**modules: str) -> dict[str, set[str]]:
    return import_graph({EFF + name.replace("__", "."): text for name, text in modules.items()})


@pytest.mark.parametrize(
    "inside", ["", "def f():\n    ", "if TYPE_CHECKING:\n    "], ids=["plain", "in a function", "for the checker"]
)
def test_a_circle_is_found(inside: str) -> None:
    found = _graph(
        optim__a=f"{inside}from lightning_eff.optim import b",
        optim__b="from lightning_eff.optim.c import x",
        optim__c="import lightning_eff.optim.a",
        optim__d="import lightning_eff.optim.a",
    )
    assert circles(found) == [[EFF + f"optim.{name}" for name in "abc"]]


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("runtime__ranks", "integration__loop"),
        ("precision__luq", "strategies__step_guard"),
        ("precision__formats__luq", "precision__layers__state"),
        ("precision__layers__state", "precision__plugin"),
        ("precision__plugin", "precision__luq"),
    ],
)
def test_an_arrow_up_is_found(module: str, target: str) -> None:
    path = (EFF + target).replace("__", ".")
    assert upward_arrows(_graph(**{module: f"import {path}", target: "x = 1"})) != []
    assert upward_arrows(_graph(**{module: "x = 1", target: f"import {(EFF + module).replace('__', '.')}"})) == [] or (
        module.partition("__")[0] != target.partition("__")[0] and "strategies" in target
    )


def test_an_arrow_between_strategies_is_found() -> None:
    found = _graph(
        strategies__a__strategy="import lightning_eff.strategies.b.queue",
        strategies__b__queue="import lightning_eff.strategies.step_guard",
        strategies__step_guard="x = 1",
    )
    assert arrows_between_strategies(found) == [
        "lightning_eff.strategies.a.strategy -> lightning_eff.strategies.b.queue"
    ]


def test_lines_of_code_are_counted() -> None:
    source = (
        '"""Doc\n\nmore."""\n\n# comment\nx = 1\n\n\ndef f():\n    """Doc."""\n    return [\n        x,  # why\n    ]\n'
    )
    assert code_lines(source) == 5


@pytest.mark.parametrize(
    ("source", "is_fault"),
    [
        ("thing._hidden", True),
        ("getattr(thing, '_hidden')", True),
        ("setattr(thing, '_hidden', 1)", True),
        ("self._hidden", False),
        ("super()._hidden", False),
        ("tensor._version", False),
        ("thing.__dict__", False),
    ],
)
def test_a_private_name_in_other_hands_is_found(source: str, is_fault: bool) -> None:
    found = {"a": "class A:\n    def f(self):\n        self._hidden = 1", "b": source}
    assert (foreign_private_names(found) != []) is is_fault
