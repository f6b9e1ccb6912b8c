"""What the rules for options refuse is said in one way; what they allow is read as a plain value."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from lightning_eff.checks import Choice, Either, Maybe, Names, Real, Whole, YesNo, check, shown
from lightning_eff.errors import ConfigurationError
from tests.arguments.values import WILD, Hostile, Numbers, Words


def _id(value: Any) -> str:
    """The same in every process: no address of an object."""
    return type(value).__name__ if " at 0x" in shown(value) else shown(value)


@pytest.mark.parametrize(
    ("rule", "given", "told"),
    [
        (Whole(2, 8), "7", "x='7' is not allowed; it must be a whole number from 2 to 8."),
        (Whole(1, 64, "why"), 65, "x=65 is not allowed; it must be a whole number from 1 to 64 (why)."),
        (Whole(1), True, "x=True is not allowed; it must be a whole number, 1 or more (2**53 at most)."),
        (Real(0, 1, below=True), 1, "x=1 is not allowed; it must be a finite number, 0 or more, below 1."),
        (Real(0, math.inf), math.nan, "x=nan is not allowed; it must be a number, 0 or more, inf at most."),
        (Choice("auto", "native"), "natve", "it must be one of 'auto', 'native'. Did you mean"),
        (YesNo(), 1, "x=1 is not allowed; it must be True or False."),
        (Maybe(Whole(1)), 0, "it must be a whole number, 1 or more (2**53 at most), or None."),
        (Either(Choice("auto"), Real(0)), [], "x=[] is not allowed; it must be one of 'auto', or a finite"),
        (Names(), "head", "x='head' is not allowed; it must be a list of name patterns, ['*.head']."),
        (Whole(1), np.ones((3, 2)), "x=<ndarray of shape (3, 2) and dtype float64> is not allowed"),
        (Whole(1), Hostile(), "x=<Hostile> is not allowed"),
        (Whole(1), 10**5000, "x=<an integer of 16610 bits> is not allowed"),
    ],
    ids=_id,
)  # fmt: skip
def test_what_is_refused_is_said_in_one_way(rule: Any, given: Any, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check("x", given, rule)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("rule", "given", "read"),
    [
        (Whole(2, 8), np.int64(7), 7),
        (Whole(2, 8), Numbers.TWO, 2),
        (Real(0, 1), np.float32(0.5), 0.5),
        (Real(0, 1), 1, 1.0),
        (Real(0, 1), Fraction(1, 2), 0.5),
        (YesNo(), np.bool_(False), False),
        (Choice("auto", "other"), Words.AUTO, "auto"),
        (Choice("auto"), np.str_("auto"), "auto"),
        (Choice(8, 6), np.int32(6), 6),
        (Names(), ["b", "a"], ("b", "a")),
        (Names(), {"b", "a"}, ("a", "b")),
    ],
    ids=_id,
)
def test_what_is_allowed_is_read_as_a_plain_value(rule: Any, given: Any, read: Any) -> None:
    found = check("x", given, rule)
    assert found == read
    assert type(found) is type(read)


def test_whatever_is_given_can_be_shown_in_a_line() -> None:
    for value in [*WILD, {"a": Hostile()}, [[[[[1]]]]], {i: i for i in range(10**4)}, torch.ones(1000, 1000)]:
        text = shown(value)
        assert len(text) < 500
        assert "\n" not in text
