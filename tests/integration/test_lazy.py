"""When the patches happen, that they happen once, and that a Lightning they do not fit is not broken by them."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lightning_eff.errors import FallbackWarning, UnsupportedCombinationError
from lightning_eff.integration import lazy
from lightning_eff.integration.connector import is_patched, patch_connector
from lightning_eff.integration.namespaces import NAMESPACES, Namespace
from tests.integration.conftest import reports, run_python

BOTH_ORDERS = """
import json, sys
import lightning_eff
light = not {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "jsonargparse", "hydra"} & set(sys.modules)
import lightning_eff.functional, lightning_eff.kernels
pure = "torch" in sys.modules and not {"lightning", "pytorch_lightning", "lightning_fabric"} & set(sys.modules)
import lightning.pytorch
alone = "pytorch_lightning" not in sys.modules
lightning.pytorch.Trainer(precision="luq4", accelerator="cpu", logger=False)
lightning.fabric.Fabric(precision="luq4", accelerator="cpu")
import pytorch_lightning
pytorch_lightning.Trainer(precision="luq4", accelerator="cpu", logger=False)
import lightning_fabric
lightning_fabric.Fabric(precision="luq4", accelerator="cpu")
print(json.dumps({"light": light, "pure": pure, "alone": alone}))
"""
LIGHTNING_FIRST = """
import json
from lightning.pytorch import Trainer
arguments = {"precision": "luq4", "accelerator": "cpu", "logger": False}
try:
    Trainer(**arguments)
except ValueError as error:
    before = str(error)
import lightning_eff.integration.lazy as lazy
Trainer(**arguments)
print(json.dumps({"before": before, "status": lazy.status()}))
"""


def test_importing_us_first_costs_nothing_and_serves_all_four(tmp_path: Path) -> None:
    assert reports(run_python("-c", BOTH_ORDERS, cwd=tmp_path)) == [{"light": True, "pure": True, "alone": True}]


def test_importing_lightning_first_works_too(tmp_path: Path) -> None:
    expected = dict.fromkeys((namespace.root for namespace in NAMESPACES), "ready")
    (report,) = reports(run_python("-c", LIGHTNING_FIRST, cwd=tmp_path))
    assert "Precision 'luq4' is invalid" in report["before"]
    assert report["status"] == expected


def test_installing_again_changes_nothing() -> None:
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
    from lightning.pytorch.trainer.trainer import Trainer

    def state() -> tuple[Any, ...]:
        wrapped = _AcceleratorConnector.__dict__
        return (
            wrapped["_check_config_and_set_final_flags"],
            wrapped["_check_and_init_precision"],
            Trainer.__init__.__annotations__["precision"],
            list(sys.meta_path),
        )

    before = state()
    lazy.install()
    assert state() == before
    assert is_patched(_AcceleratorConnector)


class _NewConnector:
    """A connector of a Lightning of the future."""

    def _check_and_init_precision(self) -> None: ...


class _OtherArguments(_NewConnector):
    def _check_config_and_set_final_flags(self, flags: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("connector", [_NewConnector, _OtherArguments, None])
def test_a_lightning_that_does_not_fit_is_left_alone_and_named(
    connector: type[Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "future_connector", types.SimpleNamespace(_Connector=connector))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "future", types.SimpleNamespace(Trainer=_NewConnector))  # type: ignore[arg-type]
    before = dict(vars(connector)) if connector else {}
    with pytest.warns(FallbackWarning) as caught:
        lazy.patch_namespace(Namespace("future", "future", "Trainer", "future_connector", "_Connector"))
    message = str(caught[0].message)
    assert "not available in future" in message
    assert "plugins=[lightning_eff.precision.LUQPrecision()]" in message
    assert "callbacks=[lightning_eff.callbacks.LowPrecision('luq4')]" in message
    assert (dict(vars(connector)) if connector else {}) == before


def test_the_finder_runs_the_action_after_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "awaited_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[int] = []
    monkeypatch.setitem(
        lazy._ACTIONS, "awaited_module", ("value", lambda: seen.append(sys.modules["awaited_module"].value))
    )
    awaited = importlib.import_module("awaited_module")
    assert seen == [1]
    assert isinstance(awaited.__loader__, importlib.machinery.SourceFileLoader)
    monkeypatch.delitem(sys.modules, "awaited_module")


def test_patching_a_subclassed_connector_is_seen_once() -> None:
    calls: list[object] = []

    class Connector:
        strategy = type("SingleDeviceStrategy", (), {})()

        def _check_config_and_set_final_flags(self, precision: object, plugins: object = None) -> None:
            calls.append(precision)

        def _check_and_init_precision(self) -> Any:
            return types.SimpleNamespace(precision="32-true")

    patch_connector(Connector)
    patch_connector(Connector)
    Connector()._check_config_and_set_final_flags(None)
    Connector()._check_config_and_set_final_flags("demo4+bf16-mixed")  # positionally as well as by keyword
    Connector()._check_config_and_set_final_flags(precision="demo4")
    assert calls == [None, "bf16-mixed", "32-true"]


def test_our_refusal_comes_before_lightnings_own_failure() -> None:
    class Connector:
        strategy = type("FSDPStrategy", (), {})()

        def _check_config_and_set_final_flags(self, precision: object, plugins: object = None) -> None: ...

        def _check_and_init_precision(self) -> Any:
            raise RuntimeError("FSDP needs something else")

    patch_connector(Connector)
    connector = Connector()
    connector._check_config_and_set_final_flags("demo4")
    with pytest.raises(UnsupportedCombinationError, match=r"FSDPStrategy \(family 'fsdp'\)"):
        connector._check_and_init_precision()
