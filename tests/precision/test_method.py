"""What a string means stands in its row: classes, grafts and refusals follow from ``MethodInfo.options``."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

import lightning_eff.precision
from lightning_eff.errors import ConfigurationError
from lightning_eff.integration.graft import check_options, graft
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.method import variants_of
from lightning_eff.runtime.contracts import ScalePredictor
from tests.precision.models import DATA, parameters_of, task, trainer

ROWS = [info for info in METHODS.values() if info.kind == "precision"]
VARIANTS = [info for info in ROWS if info.options]
every_variant = pytest.mark.parametrize("info", VARIANTS, ids=lambda info: info.name)


def made(info: MethodInfo, **options: Any) -> Any:
    return getattr(lightning_eff.precision, info.class_name)(**options)


def plain(info: MethodInfo) -> Any:
    """The plugin that Lightning makes for the first precision the method goes with."""
    return trainer(precision=info.composes_with[0]).precision_plugin


@pytest.mark.parametrize("info", ROWS, ids=lambda info: info.name)
def test_every_option_of_a_row_is_an_argument_of_its_class(info: MethodInfo) -> None:
    known = inspect.signature(info.load_mixin()).parameters
    assert set(info.options) <= set(known)
    assert all(row.options.keys() == info.options.keys() for row in variants_of(info))


@every_variant
def test_the_class_with_the_options_of_a_row_is_that_method(info: MethodInfo) -> None:
    for plugin in (made(info, **info.options), copy.deepcopy(made(info, **info.options))):
        assert plugin.info is info
        assert plugin.eff_method == info.name


@every_variant
@pytest.mark.parametrize("said", ["nothing", "None", "the same"])
def test_a_graft_need_not_say_what_the_string_says(info: MethodInfo, said: str) -> None:
    given = {"nothing": {}, "None": dict.fromkeys(info.options), "the same": dict(info.options)}[said]
    check_options(info.name, given)
    plugin = graft(plain(info), info.name, **given)
    assert plugin.info is info
    assert plugin.eff_method == info.name


@every_variant
def test_a_graft_that_contradicts_its_string_is_told_the_other_string(info: MethodInfo) -> None:
    for other in variants_of(info):
        if other is not info:
            with pytest.raises(ConfigurationError, match=rf"'{info.name}' was asked for.*Ask for '{other.name}'"):
                graft(plain(info), info.name, **other.options)


@every_variant
def test_a_class_is_told_the_values_of_its_variants(info: MethodInfo) -> None:
    for option in info.options:
        for bad in (None, "row", 7):
            with pytest.raises(ConfigurationError, match=rf"^{option}="):
                made(info, **{option: bad})


@pytest.mark.parametrize("info", [info for info in ROWS if "update" not in info.options], ids=lambda info: info.name)
def test_defaults_are_those_of_the_options(info: MethodInfo) -> None:
    mixin = info.load_mixin()
    options = mixin.options_class()
    for name, parameter in inspect.signature(mixin).parameters.items():
        assert getattr(options, name) == parameter.default, name


@pytest.mark.parametrize(
    ("options", "predicts"),
    [({"hindsight": 0.5}, True), ({}, False)],
    ids=["in hindsight", "measured"],
)
def test_a_look_at_the_model_leaves_no_trace(options: dict[str, Any], predicts: bool) -> None:
    plugin = made(METHODS["luq4"], **options)
    model, seen = task(), []

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        before = plugin.state_dict()
        seen.append(plugin.predicts_scales())
        with plugin.unchanged(), torch.enable_grad():
            self.loss((100 * DATA[:8], torch.zeros(8, dtype=torch.int64))).backward()
            self.zero_grad()
            assert plugin.state_dict() != before, "the look was made"
        assert plugin.state_dict() == before
        assert all(history.seen is None for history in plugin.histories())

    looked_at = task(on_train_batch_start=on_train_batch_start)
    for each, own in ((model, made(METHODS["luq4"], **options)), (looked_at, plugin)):
        torch.manual_seed(3)
        trainer(plugins=[own]).fit(each)
    assert isinstance(plugin, ScalePredictor)
    assert set(seen) == {predicts}
    assert torch.equal(parameters_of(model), parameters_of(looked_at))
