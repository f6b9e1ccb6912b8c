"""The choice of product: measured once, agreed on by all processes, remembered, overridden by the environment."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_eff.kernels import build, cache, capability
from tests.harness import keep_globals

NATIVE = {"native": True, "exact": True, "native_s": 1.0, "plain_s": 2.0}
PLAIN = {"native": False, "exact": True, "native_s": 2.0, "plain_s": 1.0}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    build.library()  # from the cache of the test run
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("LIGHTNING_EFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTNING_EFF_INT8", raising=False)
    monkeypatch.setattr(capability, "SIZE", 64)
    capability.is_native.cache_clear()
    yield
    capability.is_native.cache_clear()


def file(tmp_path: Path) -> Path:
    """The one measurement in the cache."""
    (found,) = (tmp_path / "cache").glob("*.json")
    return found


def answers(monkeypatch: pytest.MonkeyPatch, *measured: capability.Measured, kind: str = "int8") -> list[torch.device]:
    """Have the next measurements come out as ``measured``; the list grows with each that is made."""
    made: list[torch.device] = []
    monkeypatch.setitem(capability._MEASURES, kind, lambda device: (made.append(device), measured[len(made) - 1])[1])
    return made


CPU = torch.device("cpu")


@pytest.mark.parametrize(("forced", "native"), [("0", False), ("1", True)])
def test_environment_overrides_the_measurement(monkeypatch: pytest.MonkeyPatch, forced: str, native: bool) -> None:
    monkeypatch.setenv("LIGHTNING_EFF_INT8", forced)
    monkeypatch.setitem(capability._MEASURES, "int8", lambda _: pytest.fail("measured although the answer was given"))
    assert capability.native_int8("cpu") is native


def test_measurement_is_made_once_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = answers(monkeypatch, NATIVE, PLAIN)
    assert capability.native_int8("cpu") is True
    capability.is_native.cache_clear()  # another process
    assert capability.native_int8("cpu") is True
    assert len(calls) == 1
    assert json.loads(file(tmp_path).read_text()) == NATIVE


def nested(depth: int) -> bytes:
    return b"[" * depth


CONTENTS = {
    "empty": b"",
    "garbage": b"{broken",
    "not UTF-8": b"\xff\xfe\x00",
    "another type": b"[1, 2]",
    "null": b"null",
    "a number beyond all": b"9" * 5000,
    "nested": nested(50_000),
    "missing keys": b'{"native": true}',
    "more keys": json.dumps({**NATIVE, "more": 1}).encode(),
    "wrong types": json.dumps({**NATIVE, "native": "yes"}).encode(),
    "a number for truth": json.dumps({**NATIVE, "native": 1}).encode(),
    "nan": json.dumps({**NATIVE, "native_s": math.nan}).encode(),
    "negative": json.dumps({**NATIVE, "plain_s": -1.0}).encode(),
    "native and wrong": json.dumps({**NATIVE, "exact": False}).encode(),
    "huge": b" " * 2**20,
}


@pytest.mark.parametrize("trusted", [False, True], ids=["", "with its hash"])
@pytest.mark.parametrize("content", CONTENTS)
def test_any_other_content_is_measured_anew_and_rewritten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, trusted: bool
) -> None:
    calls = answers(monkeypatch, PLAIN, PLAIN, NATIVE)
    assert capability.native_int8() is False
    path = file(tmp_path)
    if trusted:  # written by this package, in another version
        cache.write_trusted(path, CONTENTS[content])
    else:
        path.write_bytes(CONTENTS[content])
    for _ in range(2):
        capability.is_native.cache_clear()
        assert capability.native_int8() is False
    assert len(calls) == 2
    assert json.loads(path.read_text()) == PLAIN


@given(
    st.sampled_from([None, True, [], NATIVE, PLAIN])
    | st.dictionaries(
        st.sampled_from([*NATIVE, "more"]),
        st.sampled_from([True, False, 0.0, 1.0, -1.0, math.inf, math.nan, 1, None, "x", [], {}]),
    )
)
def test_only_a_measurement_makes_sense(found: object) -> None:
    if capability.makes_sense(found):
        assert isinstance(found, dict)
        assert set(found) == set(NATIVE)
        assert found["native_s"] >= 0
        assert found["plain_s"] >= 0
        assert found["native"] in ((False, True) if found["exact"] else (False,))


def test_what_is_not_made_for_this_is_not_believed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file with sense but without its hash: what earlier versions left, or somebody else."""
    answers(monkeypatch, PLAIN, PLAIN)
    assert capability.native_int8() is False
    file(tmp_path).write_text(json.dumps(NATIVE))
    capability.is_native.cache_clear()
    assert capability.native_int8() is False


def test_a_folder_in_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers(monkeypatch, PLAIN, PLAIN)
    capability.native_int8()
    path = file(tmp_path)
    path.unlink()
    path.mkdir()
    capability.is_native.cache_clear()
    assert capability.native_int8() is False
    assert json.loads(path.read_text()) == PLAIN


# ---------------------------------------------------------------------------------------------------- agreement


def test_processes_that_measure_at_once_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads here: the lock is held per open file, so they meet as processes do."""
    answer, gate = iter((PLAIN, NATIVE, NATIVE, NATIVE)), threading.Barrier(4)

    def measure(_: torch.device) -> capability.Measured:
        time.sleep(0.05)
        return next(answer)

    found: list[capability.Measured] = []

    def process() -> None:
        gate.wait()
        found.append(capability.remembered("int8", CPU))

    monkeypatch.setitem(capability._MEASURES, "int8", measure)
    threads = [threading.Thread(target=process) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [PLAIN] * 4
    assert next(answer) == NATIVE  # one measurement was made


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("why", ["cannot be made", "full", "no locks", "held for ever"])
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int16"])
def test_without_a_place_to_agree_on_timing_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str, units: bool, kind: str
) -> None:
    if why == "cannot be made":
        (tmp_path / "file").touch()
        monkeypatch.setenv("LIGHTNING_EFF_CACHE", str(tmp_path / "file" / "below"))
        cache.private_directory().symlink_to(tmp_path)
    elif why == "full":
        monkeypatch.setattr(capability, "write_trusted", full)
    elif why == "no locks":
        monkeypatch.setattr("fcntl.flock", without_locks)
    else:
        monkeypatch.setattr(capability, "LIMIT_S", 0.0)
        (tmp_path / "cache").mkdir()
    monkeypatch.setattr(capability, "cpu_facts", lambda: ("flags : fpu avx512_vnni" if units else "flags : fpu",))
    monkeypatch.setattr(capability, "int16_native", lambda: units)
    measured: Iterator[capability.Measured] = itertools.cycle((NATIVE, PLAIN))
    monkeypatch.setitem(capability._MEASURES, kind, lambda _: next(measured))
    with cache.locked(tmp_path / "cache", 0.0) if why == "held for ever" else contextlib.nullcontext():
        chosen = [capability.remembered(kind, CPU)["native"] for _ in range(4)]
        assert chosen == [units] * 4
        measured = itertools.repeat({**PLAIN, "exact": False})
        assert capability.remembered(kind, CPU)["native"] is False


def test_a_folder_without_locks_is_left_for_the_private_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lustre without locks for the home, a local disk for temporary files."""
    lock = cache.locked

    def some(folder: Path, until: float) -> object:
        return contextlib.nullcontext(False) if folder == tmp_path / "cache" else lock(folder, until)

    monkeypatch.setattr(capability, "locked", some)
    calls = answers(monkeypatch, PLAIN, NATIVE)
    assert [capability.remembered("int8", CPU) for _ in range(3)] == [PLAIN] * 3
    assert len(calls) == 1
    assert list(cache.private_directory().glob("*.json"))
    assert not list((tmp_path / "cache").glob("*.json"))


def test_what_is_measured_without_kernels_is_not_used_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, PLAIN, NATIVE)
    monkeypatch.setattr(capability, "library", lambda: None)
    assert capability.remembered("int8", CPU) == PLAIN
    monkeypatch.setattr(capability, "library", lambda: "kernels")
    assert capability.remembered("int8", CPU) == NATIVE
    monkeypatch.setattr(capability, "library", lambda: None)
    assert capability.remembered("int8", CPU) == PLAIN


def test_another_machine_measures_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, PLAIN, NATIVE)
    assert capability.remembered("int8", CPU) == PLAIN
    monkeypatch.setattr(capability, "measurement_key", lambda: "another")
    assert capability.remembered("int8", CPU) == NATIVE


@pytest.mark.parametrize("name", ["AMD Radeon/ATI", "../../up", "", "x" * 500, "NVIDIA H200 [GPU: 0]"])
def test_any_name_of_a_gpu_is_a_file_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    calls = answers(monkeypatch, NATIVE, PLAIN)
    assert [capability.remembered("int8", torch.device("cuda")) for _ in range(2)] == [NATIVE] * 2
    assert len(calls) == 1
    assert file(tmp_path).parent == tmp_path / "cache"


@pytest.mark.parametrize(
    ("found", "int8", "fp8"), [((7, 0), False, False), ((8, 0), True, False), ((9, 0), True, True)]
)
def test_units_of_gpus(monkeypatch: pytest.MonkeyPatch, found: tuple[int, int], int8: bool, fp8: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found)
    gpu = torch.device("cuda")
    assert [capability.has_units(kind, gpu) for kind in ("int8", "fp8", "int16")] == [int8, fp8, False]


def test_other_devices_are_not_native() -> None:
    assert capability.native_int8("meta") is False


def test_measured_figures() -> None:
    found = capability.measure_int8(torch.device("cpu"))
    assert found["native_s"] > 0
    assert found["plain_s"] > 0
    assert found["native"] == (found["exact"] and found["native_s"] < found["plain_s"])


@pytest.mark.parametrize("kind", ["int8", "int16"])
def test_measuring_does_not_depend_on_where_it_is_done(kind: str) -> None:
    """The first use is inside a training step, in whatever Lightning and the user have switched on."""
    with keep_globals(), torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        torch.use_deterministic_algorithms(True)
        assert capability.measure(kind, CPU)["exact"] is True


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
    what = (
        "compiled quantisers, compiled families, int8 products, int8 speed, int16 products, int16 speed, fp8 products"
    )
    assert ", ".join(text) == f"{what}, compiler, cache, cache state"
    assert "float32 at 64^3" in text["int8 speed"]
    assert "float64 at 64^3" in text["int16 speed"]
    if build.library() is not None:
        assert {"bf16", "float_format", "fp8", "int16_product", "quantize"} < set(text["compiled families"].split(", "))
        assert text["cache"] == str(build.obtained().folder)
        assert text["cache state"] == "checked and used"


def test_description_says_what_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = build.Obtained(None, None, ("The folder /x cannot be used: others may write to it.", "And more."))
    monkeypatch.setattr(capability, "obtained", lambda: outcome)
    text = capability.describe()
    assert text["cache state"] == "The folder /x cannot be used: others may write to it. And more."
    assert text["cache"] == os.environ["LIGHTNING_EFF_CACHE"]
