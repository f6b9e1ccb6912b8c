"""Every benchmark runs, at sizes at which its figures mean nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import _peers, _setup, compile_time, memory, quality, quantizers, step
from benchmarks._workloads import Workload

Main = Callable[[Sequence[str]], int]


def rows(folder: Path) -> list[dict]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())["rows"]


def test_quantizers(tmp_path: Path) -> None:
    arguments = ["--sizes", "4096", "--rounds", "1", "--check", "--results", str(tmp_path)]
    assert quantizers.main(arguments) == 0
    pairs = {row["pair"] for row in rows(tmp_path)}
    assert {"copy / copy", "fast luq_codes / copy", "naive luq_codes / copy"} <= pairs


def test_step(tmp_path: Path) -> None:
    variants = "bf16-mixed,luq4,luq4-smp2,luq4-hindsight,luq4-emulated,luq4-fallback,luq4+bf16-mixed"
    arguments = ["--tiny", "--rounds", "1", "--variants", variants, "--check", "--results", str(tmp_path)]
    assert step.main(arguments) == 0
    found = rows(tmp_path)
    assert len(found) == 3 * 8
    assert all(row["value"]["median"] > 0 for row in found)


def test_bfloat16_weights_are_compared_with_bf16_true_as_well(tmp_path: Path) -> None:
    variants = "bf16-sr,bf16-kahan,bf16-split"
    arguments = ["--tiny", "--rounds", "1", "--model", "mlp", "--variants", variants, "--results", str(tmp_path)]
    assert step.main(arguments) == 0
    bases = [f"{name} / {base}" for name in variants.split(",") for base in ("fp32", "bf16-true")]
    assert [row["pair"] for row in rows(tmp_path)] == ["fp32 / fp32", "bf16-true / fp32", *bases]
    limits = [
        step.TARGETS[name, "bf16-true"][model] for name in variants.split(",") for model in ("mlp", "gpt", "resnet")
    ]
    assert limits == [1.10] * 9


def test_a_peer_without_layers_to_convert_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(work: Workload) -> None:
        raise _peers.UnsupportedError(f"no layer of {work.name}")

    monkeypatch.setitem(_peers.CONVERT, "torchao", nothing)
    monkeypatch.setattr(step.peers, "missing", lambda variants: [])
    arguments = ["--tiny", "--rounds", "1", "--model", "mlp", "--variants", "torchao", "--results", str(tmp_path)]
    assert step.main(arguments) == 0
    assert [row["pair"] for row in rows(tmp_path)] == ["fp32 / fp32"]
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["notes"] == ["torchao on mlp: n/a, no layer of mlp"]


def test_step_on_two_threads_uses_wall_time(tmp_path: Path) -> None:
    arguments = ["--tiny", "--rounds", "1", "--model", "mlp", "--variants", "luq4", "--threads", "2"]
    assert step.main([*arguments, "--results", str(tmp_path)]) == 0
    assert {row["settings"]["clock"] for row in rows(tmp_path)} == {"wall"}


def test_memory(tmp_path: Path) -> None:
    assert memory.main(["--tiny", "--check", "--results", str(tmp_path)]) == 0
    layers = {
        (row["settings"]["model"], row["pair"]): row["value"]["median"]
        for row in rows(tmp_path)
        if row["settings"]["scope"] == "quantised layers"
    }
    assert layers["mlp", "bf16-mixed / fp32"] == 0.5
    assert 0.125 <= layers["mlp", "luq4 / fp32"] < 0.13


@pytest.mark.long
def test_compile_time(tmp_path: Path) -> None:
    assert compile_time.main(["--tiny", "--rounds", "1", "--check", "--results", str(tmp_path)]) == 0
    assert {"luq4 cold, first step", "luq4 warm, first step"} <= {row["pair"] for row in rows(tmp_path)}


def test_every_format_is_counted(tmp_path: Path) -> None:
    assert memory.main(["--tiny", "--model", "mlp", "--variants", "family", "--results", str(tmp_path)]) == 0
    layers = {
        row["pair"].partition(" /")[0]: row["value"]["median"]
        for row in rows(tmp_path)
        if row["settings"]["scope"] == "quantised layers"
    }
    assert layers.keys() == {"bf16-mixed", "bf16-true", *_setup.FORMATS} - _setup.LUQ_VARIANTS.keys()
    assert all(0.125 <= share <= 0.52 for share in layers.values())


@pytest.mark.long
def test_quality(tmp_path: Path) -> None:
    variants = ",".join(quality.VARIANTS)
    assert quality.main(["--tiny", "--seeds", "1", "--variants", variants, "--results", str(tmp_path)]) == 0
    found = rows(tmp_path)
    assert len(found) == 2 * len(quality.VARIANTS), "every variant on both tasks"
    assert all(len(row["details"]["values"]) == 1 for row in found)
    assert {"float16 without loss scaling" in row["pair"] for row in found} == {True, False}


def test_quality_knows_every_precision() -> None:
    from lightning_eff.methods import METHODS

    precisions = {name for name, info in METHODS.items() if info.kind == "precision"}
    assert precisions <= set(quality.FAMILY) <= set(quality.VARIANTS)
    assert set(quality.DEFAULT_VARIANTS.split(",")) <= set(quality.VARIANTS)


@pytest.mark.parametrize("main", [step.main, quality.main, memory.main])
def test_unknown_variants_are_refused(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--variants", "luq5"])
    assert "luq5" in capsys.readouterr().err
