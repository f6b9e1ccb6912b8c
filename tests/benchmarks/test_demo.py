"""The demo, and the comparison of a pipeline with one process, at their smallest settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_prints_tables_and_draws_a_figure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.demo", "--fast", "--seeds", "2", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "loss_curves.png").stat().st_size > 10_000
    for words in (
        "bf16-mixed",
        "luq4 SMP-2",
        "CNN on digits: luq4 against fp32 is",
        "GPT on Python source: luq4 against",
    ):
        assert words in done.stdout


@pytest.mark.long
def test_the_gpt_in_two_processes_and_in_one(tmp_path: Path) -> None:
    """Two processes, of which rank 0 alone prints; the schedule is drawn where it was asked for."""
    command = [sys.executable, "-m", "benchmarks.pipelined_bp_text", "--fast", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("x one process, ") == 1
    (row,) = [line.split() for line in done.stdout.splitlines() if "bits per character  " in line]
    alone, ours = map(float, row[-2:])
    assert 0 < ours < 7.5, "7 bits are a guess among 128 characters"
    assert abs(ours - alone) < 1
    assert "<svg" in (tmp_path / "out" / "pipeline_schedule.svg").read_text(encoding="utf-8")
