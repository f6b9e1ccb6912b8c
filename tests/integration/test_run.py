"""Untouched projects in fresh interpreters: the runner under every launcher, hydra, and a script's own failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import SCRIPTS, reports, run_python


def _facts(found: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return sorted((line["rank"], line["method"], line["base"], line["swapped"]) for line in found)  # type: ignore[type-var]


def test_a_lightning_cli_project_on_two_processes(tmp_path: Path) -> None:
    arguments = ["fit", "--trainer.precision", "luq4", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    found = reports(run_python("-m", "lightning_eff", "run", str(SCRIPTS / "cli_app.py"), *arguments, cwd=tmp_path))
    assert _facts(found) == [(0, "luq4", "32-true", True), (1, "luq4", "32-true", True)]
    for line in found:  # both processes see the arguments they would have seen without us
        assert (line["argv"], line["script"]) == (arguments, "cli_app.py")


@pytest.mark.long
def test_a_module_whose_classes_must_be_found_by_spawned_processes() -> None:
    done = run_python(
        *("-m", "lightning_eff", "run", "-m", "app", "ddp_spawn", "2"),
        cwd=SCRIPTS,
        PL_TRAINER_PRECISION="luq4+bf16-mixed",
    )
    found = reports(done)
    assert _facts(found) == [(0, "luq4", "bf16-mixed", True), (1, "luq4", "bf16-mixed", True)]
    assert {line["main_file"] for line in found} == {"app.py"}


def test_a_hydra_project_needs_no_runner(tmp_path: Path) -> None:
    done = run_python(str(SCRIPTS / "hydra_app.py"), f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    assert _facts(reports(done)) == [(0, "luq4", "32-true", True)]


def test_a_scripts_failure_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import sys\nassert 'os' not in globals() and 'prepare' not in globals()\nsys.exit(7)\n"
    )
    assert run_python("-m", "lightning_eff", "run", "broken.py", cwd=tmp_path).returncode == 7
    (tmp_path / "broken.py").write_text("def f():\n    raise KeyError('mine')\nf()\n")
    done = run_python("-m", "lightning_eff", "run", "broken.py", cwd=tmp_path)
    assert done.returncode == 1
    assert f'{tmp_path / "broken.py"}", line 2, in f' in done.stderr
    assert "KeyError: 'mine'" in done.stderr
