"""Every row of METHODS keeps what it says: a card, a shell, names in order."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from lightning_eff.methods import METHODS, MethodInfo, papers

SECTIONS = ["When to use", "Cost", "Gain", "Combines with", "Limits", "State", "Metrics", "References"]

every_method = pytest.mark.parametrize("info", METHODS.values(), ids=lambda info: info.name)


def card(info: MethodInfo) -> str:
    path = files("lightning_eff") / "cards" / f"{info.name}.md"
    assert path.is_file(), f"{info.name} has no card lightning_eff/cards/{info.name}.md"
    return path.read_text(encoding="utf-8")


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## +(.+?) *$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], (body.strip() for body in parts[2::2]), strict=True))


@every_method
def test_the_card_has_every_section_in_order(info: MethodInfo) -> None:
    text = card(info)
    assert text.startswith("# "), "a card opens with its title"
    found = sections(text)
    assert [name for name in found if name in SECTIONS] == SECTIONS
    assert [name for name in SECTIONS if not found[name]] == []


@every_method
def test_the_card_gives_each_gain_with_command_machine_and_date(info: MethodInfo) -> None:
    rows = [line for line in sections(card(info))["Gain"].splitlines() if line.startswith("|")]
    header = rows[0].lower()
    assert all(word in header for word in ("command", "machine", "date"))
    assert len(rows) > 2, "a table of gains has at least one figure"
    assert all(re.search(r"\d{4}-\d{2}-\d{2}", row) for row in rows[2:]), "every figure carries its date"


@every_method
def test_the_card_tells_every_state_key_and_metric(info: MethodInfo) -> None:
    found = sections(card(info))
    assert [key for key in info.state_keys if f"`{key}`" not in found["State"]] == []
    assert [key for key in info.metrics if f"`{key}`" not in found["Metrics"]] == []


@every_method
def test_the_card_cites_the_paper_or_says_that_there_is_none(info: MethodInfo) -> None:
    references = sections(card(info))["References"]
    if info.paper == papers.OURS:
        assert references.startswith("None: ")
    else:
        (address,) = re.findall(r"https?://\S+", info.paper)
        assert address in references


@every_method
def test_names_are_lower_case_and_metrics_are_prefixed(info: MethodInfo) -> None:
    assert list(info.strings) == [string.lower() for string in info.strings]
    assert METHODS[info.name] is info
    assert all(key.startswith(f"eff/{info.name}/") for key in info.metrics)
    assert set(info.composes_with).isdisjoint(info.conflicts), "a precision is composed with or refused, not both"


@every_method
def test_the_shell_loads_and_carries_the_row(info: MethodInfo) -> None:
    shell = info.load_mixin()
    assert shell.__name__.removesuffix("Mixin") in (
        info.class_name,
        re.sub("(Precision|Strategy)$", "", info.class_name),
    )
    # Rows may share a class (the variants of one method); it carries the first of them.
    assert shell.info is next(row for row in METHODS.values() if row.mixin == info.mixin)
    assert shell.__doc__


def test_no_card_without_a_method() -> None:
    names = {path.name.removesuffix(".md") for path in (files("lightning_eff") / "cards").iterdir()}
    assert names == set(METHODS)


def test_no_string_belongs_to_two_methods() -> None:
    strings = [string for info in METHODS.values() for string in info.strings]
    assert len(strings) == len(set(strings))
