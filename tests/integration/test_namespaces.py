"""Classes made per namespace: same name, visible signature, picklable, one per (mixin, base)."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_eff.errors import MissingDependencyError
from lightning_eff.integration import namespaces
from lightning_eff.integration.namespaces import NAMESPACES, base_class, class_getter, make_class, public_classes
from tests.integration.demo_shell import DemoMixin

ROOTS = [namespace.root for namespace in NAMESPACES]


@pytest.mark.parametrize("root", ROOTS)
def test_the_class_is_one_of_its_namespace(root: str) -> None:
    base = base_class(root, "precision")
    made = make_class(DemoMixin, base)
    assert make_class(DemoMixin, base) is made
    assert issubclass(made, base)
    assert made.__qualname__ == made.__name__ == "DemoPrecision"
    assert made.eff_method == "demo4"
    assert list(inspect.signature(made).parameters) == ["levels", "smp"]
    assert made.__doc__ == DemoMixin.__doc__


def test_namespaces_do_not_share_classes() -> None:
    made = {make_class(DemoMixin, base_class(root, "precision")) for root in ROOTS}
    assert len(made) == len(ROOTS)


@pytest.mark.parametrize("copier", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy])
@pytest.mark.parametrize("root", ROOTS)
def test_instances_survive_copying(root: str, copier: Any) -> None:
    made = make_class(DemoMixin, base_class(root, "precision"))
    copied = copier(made(levels=8))
    assert type(copied) is made
    assert (copied.levels, copied.smp) == (8, 1)


def test_pickles_hold_the_recipe_not_the_class(ns: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # A fresh interpreter has no made classes: what is pickled must be enough to make them again.
    plugin = ns.trainer(precision="demo4+bf16-mixed").precision_plugin
    data = pickle.dumps(plugin)
    monkeypatch.setattr(namespaces, "_MADE", {})
    copied = pickle.loads(data)
    assert type(copied) is not type(plugin)
    assert type(copied).__mro__[1:] == type(plugin).__mro__[1:]
    assert (copied.eff_method, copied.precision, copied.device) == ("demo4", "bf16-mixed", "cpu")


class UsersMixin(DemoMixin):
    """A subclass somebody wrote."""


def test_a_users_subclass_of_a_made_class_pickles_by_reference() -> None:
    copied = pickle.loads(pickle.dumps(UsersPrecision(levels=5)))
    assert type(copied) is UsersPrecision
    assert copied.levels == 5


UsersPrecision = type(
    "UsersPrecision",
    (make_class(UsersMixin, base_class("lightning.pytorch", "precision")),),
    {"__module__": __name__},
)


def test_public_classes_say_where_they_can_be_imported_from() -> None:
    import lightning_eff
    import lightning_eff.callbacks
    import lightning_eff.precision
    import lightning_eff.pytorch_lightning
    import lightning_eff.strategies

    assert lightning_eff.LowPrecision is lightning_eff.callbacks.LowPrecision
    eff = lightning_eff
    for module in (eff.callbacks, eff.precision, eff.strategies, eff.pytorch_lightning):
        for name in module.__all__:
            made = getattr(module, name)
            assert (made.__module__, made.__qualname__) == (module.__name__, name)
            assert pickle.loads(pickle.dumps(made)) is made
        assert set(module.__all__) <= set(dir(module))
        with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
            module.Nonsense  # noqa: B018


def test_what_is_typed_is_what_is_made() -> None:
    import lightning_eff.callbacks
    import lightning_eff.precision
    import lightning_eff.pytorch_lightning
    import lightning_eff.strategies

    precision = {name for name in public_classes("precision") if name not in ("DemoPrecision", "OtherPrecision")}
    callbacks = set(public_classes("callback"))
    assert set(lightning_eff.precision.__all__) == precision
    assert set(lightning_eff.callbacks.__all__) == callbacks
    strategies = set(public_classes("strategy"))
    assert set(lightning_eff.strategies.__all__) == strategies
    assert set(lightning_eff.pytorch_lightning.__all__) == precision | strategies | callbacks


def test_a_missing_namespace_names_the_package_to_install() -> None:
    shells = {"DemoPrecision": ("precision", "tests.integration.demo_shell:DemoMixin")}
    getter = class_getter("somewhere", "no_such_lightning", shells)  # type: ignore[arg-type]
    with pytest.raises(MissingDependencyError, match="pip install no-such-lightning"):
        getter("DemoPrecision")


def test_state_keys_are_portable_between_namespaces(tmp_path: Any, ns: SimpleNamespace) -> None:
    trainer = ns.trainer(precision="demo4")
    trainer.fit(ns.model())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["DemoPrecision"] == {"calls": 2}
