"""The choice of product: measured once, remembered, overridden by the environment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_eff.kernels import capability


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("LIGHTNING_EFF_CACHE", str(tmp_path))
    monkeypatch.delenv("LIGHTNING_EFF_INT8", raising=False)
    monkeypatch.setattr(capability, "SIZE", 64)
    capability._native.cache_clear()
    yield
    capability._native.cache_clear()


@pytest.mark.parametrize(("forced", "native"), [("0", False), ("1", True)])
def test_environment_overrides_the_measurement(monkeypatch: pytest.MonkeyPatch, forced: str, native: bool) -> None:
    monkeypatch.setenv("LIGHTNING_EFF_INT8", forced)
    monkeypatch.setitem(capability._MEASURES, "int8", lambda _: pytest.fail("measured although the answer was given"))
    assert capability.native_int8("cpu") is native


def test_measurement_is_made_once_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    answer = {"native": True, "exact": True, "native_s": 1.0, "plain_s": 2.0}
    monkeypatch.setitem(capability._MEASURES, "int8", lambda device: (calls.append(device), answer)[1])
    assert capability.native_int8("cpu") is True
    capability._native.cache_clear()  # another process
    assert capability.native_int8("cpu") is True
    assert len(calls) == 1
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == answer
    file.write_text("{broken")
    capability._native.cache_clear()
    assert capability.native_int8("cpu") is True
    assert len(calls) == 2


def test_other_devices_are_not_native() -> None:
    assert capability.native_int8("meta") is False


def test_measured_figures() -> None:
    found = capability.measure_int8(torch.device("cpu"))
    assert found["native_s"] > 0
    assert found["plain_s"] > 0
    assert found["native"] == (found["exact"] and found["native_s"] < found["plain_s"])


def test_wrong_sums_are_never_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "code_product", lambda a, b, native: (a.int() @ b.int()) + 1)
    found = capability.measure_int8(torch.device("cpu"))
    assert found["exact"] is False
    assert found["native"] is False


def test_a_machine_without_int8_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("not implemented for this device")

    monkeypatch.setattr(capability, "code_product", refuse)
    assert capability.measure_int8(torch.device("cpu"))["native"] is False
    text = capability.describe()  # also then
    assert text["int8 products"] == "emulated in float32"


def test_description(tmp_path: Path) -> None:
    text = capability.describe()
    assert set(text) == {"compiled quantisers", "int8 products", "int8 speed", "cache"}
    assert text["cache"] == str(tmp_path)
