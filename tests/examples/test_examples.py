"""The examples run as their first lines say, at their smallest settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_quickstart_by_its_path(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--fast", "--seeds", "2", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "loss_curves.png").stat().st_size > 10_000
    for words in (
        "bf16-mixed",
        "luq4 SMP-2",
        "CNN on digits: luq4 against fp32 is",
        "GPT on Python source: luq4 against",
    ):
        assert words in done.stdout


@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
def test_add_to_your_project() -> None:
    from examples.add_to_your_project import main

    losses = [main(["--epochs", "2", "--precision", precision]) for precision in ("luq4", "luq4+bf16-mixed", "32-true")]
    assert all(loss < 1.5 for loss in losses)  # ln 10 = 2.3 is a guess


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.train_cli import main

    monkeypatch.setattr("sys.argv", ["train_cli.py"])  # LightningCLI remarks on arguments of the test runner
    config = f"--config={ROOT / 'examples' / 'cli_luq4.yaml'}"
    trainer = main(
        ["fit", config, "--trainer.max_epochs=1", "--model.width=8", f"--trainer.default_root_dir={tmp_path}"]
    )
    assert trainer.trainer.precision_plugin.eff_method == "luq4"
    assert trainer.trainer.callback_metrics["val_accuracy"] > 0.2


@pytest.mark.long
def test_stragglers_by_its_path(tmp_path: Path) -> None:
    """Rank 1 is always slow, so that dropping is certain: one of its eight micro-batches, a sixteenth of all."""
    command = [sys.executable, str(ROOT / "examples" / "stragglers.py"), "--fast", "--delay", "slow:rank=1,factor=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells = {line[:48].strip(): line[48:].split() for line in done.stdout.splitlines()}
    assert cells["micro-batches dropped"][0] == "0.0%"
    assert 0 < float(cells["micro-batches dropped"][1].rstrip("%")) <= 15
    assert all(float(cell) > 90 for cell in cells["held-out accuracy, %"])
    assert done.stdout.count("dropcompute over ddp, seed by seed:") == 1, "rank 0 alone prints"
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_pipeline_by_its_path(tmp_path: Path) -> None:
    """Two processes, of which rank 0 alone prints; the schedule is drawn where it was asked for."""
    command = [sys.executable, str(ROOT / "examples" / "pipeline.py"), "--fast", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("x one process, ") == 1
    (row,) = [line.split() for line in done.stdout.splitlines() if "bits per character  " in line]
    alone, ours = map(float, row[-2:])
    assert 0 < ours < 7.5, "7 bits are a guess among 128 characters"
    assert abs(ours - alone) < 1
    assert "<svg" in (tmp_path / "out" / "pipeline_schedule.svg").read_text(encoding="utf-8")


def write_batch(path: Path, images: int) -> None:
    generator = np.random.default_rng(0)
    records = generator.integers(0, 256, (images, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    records.tofile(path)


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples import cifar10

    monkeypatch.chdir(tmp_path)  # where the Trainer puts its checkpoint
    write_batch(tmp_path / "data_batch_1.bin", 8)
    write_batch(tmp_path / "test_batch.bin", 4)
    arguments = ["--data", str(tmp_path), "--epochs", "1", "--width", "8", "--batch-size", "4"]
    assert 0 <= cifar10.main(arguments) <= 1


def test_cifar10_reads_what_was_written(tmp_path: Path) -> None:
    from examples.cifar10 import read_batch

    pixels = np.arange(3072, dtype=np.uint8)
    np.concatenate([np.array([7], np.uint8), pixels]).tofile(tmp_path / "one.bin")
    images, labels = read_batch(tmp_path / "one.bin")
    assert labels.tolist() == [7]
    assert images.shape == (1, 3, 32, 32)
    assert images.flatten().tolist() == pixels.tolist()
    (tmp_path / "bad.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="not a CIFAR-10 binary file"):
        read_batch(tmp_path / "bad.bin")
