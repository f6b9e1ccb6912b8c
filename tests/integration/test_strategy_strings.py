"""Strategy strings that nobody knows, and ours where there is no Trainer: the answer names what to write."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_eff.errors import UnknownMethodError, UnsupportedCombinationError
from lightning_eff.methods import METHODS

OURS = [info.name for info in METHODS.values() if info.kind == "strategy"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("dropcomput", "dropcompute"), ("pipelined-bp", "pipelined_bp"), ("Pipeline_BP", "pipelined_bp")],
)
def test_the_nearest_of_ours_is_named(ns: SimpleNamespace, given: str, meant: str) -> None:
    with pytest.raises(UnknownMethodError, match=f"invalid strategy name.*Did you mean '{meant}'") as caught:
        ns.trainer(strategy=given)
    assert all(name in str(caught.value) for name in OURS)


def test_a_name_like_nothing_of_ours_gets_lightnings_answer_and_our_list(ns: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="invalid strategy name") as caught:
        ns.trainer(strategy="zzz")
    assert "Did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in OURS)


@pytest.mark.parametrize("name", OURS)
def test_fabric_says_why_it_has_none_of_ours(ns: SimpleNamespace, name: str) -> None:
    with pytest.raises(UnsupportedCombinationError, match=rf"needs a Trainer.*Trainer\(strategy='{name}'\)"):
        ns.fabric(strategy=name, accelerator="cpu", devices=1)


def test_other_errors_of_a_strategy_are_lightnings(ns: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="accelerator") as caught:
        ns.trainer(strategy="ddp", accelerator="no such thing")
    assert type(caught.value) is ValueError
