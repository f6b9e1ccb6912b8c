"""What tests of kernels share: a compiled library, numbers of threads, a cache as a new process finds it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_eff.kernels import build, cache
from tests.harness import keep_globals
from tests.kernels.building import forget


@pytest.fixture
def compiled_kernels() -> None:
    """Skip where nothing is compiled: the test would compare ``functional`` with itself."""
    if build.library() is None:
        pytest.skip("no compiled kernels here")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads torch, and hence kernels, may use."""
    with keep_globals():
        torch.set_num_threads(request.param)
        yield request.param


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library this test run uses: compiling takes too long to do it in every test."""
    folder = build.obtained().folder
    if folder is None:
        pytest.skip("no compiled kernels here")
    data = cache.read_trusted(folder / f"kernels-{build.build_key()}.so")
    path = tmp_path_factory.mktemp("prebuilt") / "prebuilt.so"
    path.write_bytes(data)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache and an empty folder of temporary files, as new processes find them."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("LIGHTNING_EFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTNING_EFF_KERNELS", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    forget()
