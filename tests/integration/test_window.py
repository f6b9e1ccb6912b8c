"""Both ends of the supported Lightning window: the installed one, and the lowest in an environment of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import SCRIPTS, make_environment, reports, run_python

SMOKE = Path(__file__).with_name("window_smoke.py")
LOWEST = "2.2.5"


def test_the_installed_end(tmp_path: Path) -> None:
    done = run_python(str(SMOKE), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("0 failures")
    assert done.stdout.count("\nok ") == 12


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_lowest_end(tmp_path: Path) -> None:
    python = make_environment(
        tmp_path / "venv",
        *(f"lightning=={LOWEST}", f"pytorch-lightning=={LOWEST}", "numpy", "rich", "jsonargparse[signatures]>=4.27.7"),
        "setuptools<81",  # this Lightning imports pkg_resources
    )
    done = run_python(str(SMOKE), cwd=tmp_path, python=python)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"lightning {LOWEST} " in done.stdout
    done = run_python(
        *("-m", "lightning_eff", "run", str(SCRIPTS / "app.py"), "ddp_spawn", "2"),
        cwd=tmp_path,
        python=python,
        PL_TRAINER_PRECISION="luq4",
    )
    assert sorted((line["rank"], line["swapped"]) for line in reports(done)) == [(0, True), (1, True)]
