"""Precision strings: ours, Lightning's, and the ones nobody knows."""

from __future__ import annotations

import pytest

from lightning_eff.errors import UnknownMethodError, UnsupportedCombinationError
from lightning_eff.integration.names import parse_precision, precision_method, precision_strings


@pytest.mark.parametrize(
    ("given", "base", "built"),
    [
        ("demo4", None, "32-true"),
        ("DEMO4", None, "32-true"),
        ("demo4+32-true", "32-true", "32-true"),
        ("demo4+bf16-mixed", "bf16-mixed", "bf16-mixed"),
        ("Demo4+BF16-Mixed", "bf16-mixed", "bf16-mixed"),
        ("demo4+bf16", "bf16-mixed", "bf16-mixed"),
        ("demo4+32", "32-true", "32-true"),
    ],
)
def test_our_strings_are_split(given: str, base: str | None, built: str) -> None:
    request = parse_precision(given)
    assert request is not None
    assert (request.info.name, request.base, request.base_or_default) == ("demo4", base, built)


@pytest.mark.parametrize("given", ["bf16-mixed", "32", "banana", "", "+demo4", 32, 16, None, 4.0])
def test_everything_else_is_left_to_lightning(given: object) -> None:
    assert parse_precision(given) is None


def test_a_known_bad_combination_names_its_reason_and_what_is_allowed() -> None:
    for given in ("demo4+16-mixed", "demo4+16"):
        with pytest.raises(UnsupportedCombinationError) as caught:
            parse_precision(given)
        message = str(caught.value)
        assert "the scaler is in the way" in message
        assert "'demo4+bf16-mixed'" in message


def test_a_combination_nobody_tried_is_refused_too() -> None:
    with pytest.raises(UnsupportedCombinationError, match="'64-true': not shown to work"):
        parse_precision("demo4+64-true")


@pytest.mark.parametrize(("given", "meant"), [("demo4+bf16-mixd", "demo4+bf16-mixed"), ("demo4+", "demo4")])
def test_an_unknown_rest_names_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(UnknownMethodError, match="is not a precision of Lightning") as caught:
        parse_precision(given)
    assert f"Did you mean {meant!r}?" in str(caught.value)


def test_method_lookup_names_the_nearest() -> None:
    assert precision_method("demo4").class_name == "DemoPrecision"
    with pytest.raises(UnknownMethodError, match=r"Did you mean 'demo4'\?"):
        precision_method("dmo4")


def test_every_advertised_string_parses() -> None:
    strings = precision_strings()
    assert {"luq4", "luq4+bf16-mixed", "demo4"} <= set(strings)
    assert all(parse_precision(string) is not None for string in strings)
