"""The examples run as their first lines say, at their smallest settings."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


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
        ["fit", config, "--trainer.max_epochs=3", "--model.width=8", f"--trainer.default_root_dir={tmp_path}"]
    )
    assert trainer.trainer.precision_plugin.eff_method == "luq4"
    assert trainer.trainer.callback_metrics["val_accuracy"] > 0.2


def run(*arguments: str, folder: Path) -> str:
    """Run an example by its path, from a folder that is not the repository; return what it prints."""
    command = [sys.executable, str(ROOT / "examples" / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_stragglers_by_its_path(tmp_path: Path) -> None:
    """Rank 1 is always slow, so that dropping is certain."""
    printed = run(
        "stragglers.py", "--steps", "16", "--warmup-steps", "8", "--delay", "slow:rank=1,factor=4", folder=tmp_path
    )
    plain, ours = (line for line in printed.splitlines() if ", median step " in line)  # rank 0 alone prints
    assert plain.startswith("DDPStrategy: ")
    assert ", 0.0% of the micro-batches" in plain
    dropped = re.match(r"DropComputeStrategy: .* ([0-9.]+)% of the micro-batches dropped", ours)
    assert dropped is not None
    assert 0 < float(dropped[1]) <= 50
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_pipeline_by_its_path(tmp_path: Path) -> None:
    """Two processes, of which rank 0 alone prints; the schedule is drawn where it was asked for."""
    printed = run("pipeline.py", "--epochs", "3", "--output", str(tmp_path / "out"), folder=tmp_path)
    (accuracy,) = re.findall(r"accuracy on held-out digits after 3 epochs: ([0-9.]+)%", printed)
    assert float(accuracy) > 80
    assert "<svg" in (tmp_path / "out" / "pipeline_schedule.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("example", ["add_to_your_project.py", "cifar10.py", "pipeline.py", "stragglers.py"])
def test_an_example_stands_alone(example: str) -> None:
    """Whoever copies the file needs nothing but the package."""
    tree = ast.parse((ROOT / "examples" / example).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name and name.partition(".")[0] in ("examples", "benchmarks", "tests")}


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
