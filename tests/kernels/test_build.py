"""Getting the compiled kernels, not getting them, and two processes getting them at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_eff.kernels import build

# Prints sums that any difference in a code, a scale or a product would change, and the warnings' categories.
PROGRAM = """
import warnings, torch
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from lightning_eff.functional.formats import Codes
    from lightning_eff.kernels.build import library
    from lightning_eff.kernels.geometry import Geometry
    from lightning_eff.kernels import convolution, products, quantize
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 6, 7, 5, 8, generator=generator)
    def digest(t):
        return float((t.double().reshape(-1) * torch.arange(1, t.numel() + 1)).sum())
    grad = quantize.luq_codes(x, seed=7)
    scale = torch.tensor(0.4)
    codes, packed, unsigned = quantize.sawb_encode(x, pack=True, scale=scale)
    relu = quantize.sawb_encode(x.relu(), unsigned="mirror5", scale=scale)[0]
    print(digest(grad.codes), float(grad.scale), digest(codes.codes), digest(packed), unsigned, digest(relu.codes))
    print(digest(quantize.unpack_int4(packed, x.numel())), float(quantize.largest_magnitude(x)))
    geometry = Geometry((3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1))
    weight = Codes(codes.codes.reshape(-1)[: 5 * 18 * 8].view(5, 18, 8), scale)
    y = convolution.conv_forward(codes, weight, geometry, native=True, bias=torch.ones(5))
    print(digest(y), digest(convolution.conv_weight_grad(quantize.luq_codes(y, seed=1), codes, geometry, native=True)))
    print(digest(products.scaled_product(Codes(grad.codes.view(-1, 8), grad.scale),
                                         Codes(codes.codes.view(-1, 8).t()[:, :50], scale), native=True)))
print("compiled", library() is not None)
print("warnings", [w.category.__name__ for w in seen if "quantisers" in str(w.message)])
"""


def environment(cache: Path, **changes: str) -> dict[str, str]:
    root = str(Path(build.__file__).parents[2])
    inherited = {name: value for name, value in os.environ.items() if name not in ("LIGHTNING_EFF_KERNELS", "CXX")}
    return {**inherited, "LIGHTNING_EFF_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **changes}


def run(env: dict[str, str]) -> list[str]:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_switched_off_broken_and_compiled_give_the_same_numbers(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'this compiler is broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    (tmp_path / "file").write_text("a cache folder that cannot be made")
    off = run(environment(tmp_path / "off", LIGHTNING_EFF_KERNELS="0"))
    failed = run(environment(tmp_path / "failed", CXX=str(broken)))
    unwritable = run(environment(tmp_path / "file" / "below"))
    assert off[-2:] == ["compiled False", "warnings []"]
    assert failed[-2:] == unwritable[-2:] == ["compiled False", "warnings ['FallbackWarning']"]
    assert failed[:-2] == unwritable[:-2] == off[:-2]
    assert not (tmp_path / "off").exists()
    if build.library() is None:
        pytest.skip("no compiled kernels here")
    compiled = run(environment(tmp_path / "compiled"))
    assert compiled[-2:] == ["compiled True", "warnings []"]
    assert compiled[:-2] == off[:-2]


def test_two_processes_build_into_one_empty_cache(tmp_path: Path) -> None:
    if build.library() is None:
        pytest.skip("no compiled kernels here")
    cache = tmp_path / "cache"
    code = "from lightning_eff.kernels.build import library; assert library() is not None"
    command = [sys.executable, "-W", "error::lightning_eff.errors.FallbackWarning", "-c", code]
    started = [subprocess.Popen(command, env=environment(cache), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in started:
        _, errors = process.communicate(timeout=110)
        assert process.returncode == 0, errors
    assert [path.suffix for path in cache.iterdir()] == [".so"]  # one result, no scratch folder left


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIGHTNING_EFF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_directory() == tmp_path / "lightning_eff"
    monkeypatch.setenv("LIGHTNING_EFF_CACHE", str(tmp_path / "mine"))
    assert build.cache_directory() == tmp_path / "mine"


def test_the_machine_has_one_name() -> None:
    assert build.machine_key() == build.machine_key()
    assert len(build.machine_key()) == 16
