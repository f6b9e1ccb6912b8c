"""Other people's libraries, installed from PyPI and not touched, train under ``luq4``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.conftest import make_environment, reports, run_python

APPS = Path(__file__).parent / "third_party"
LIGHTNING = ">=2.2.5,!=2.6.2,!=2.6.3"

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_environment(
        tmp_path_factory.mktemp("third_party") / "venv",
        *(f"lightning{LIGHTNING}", f"pytorch-lightning{LIGHTNING}", "rich", "pytorch-forecasting", "neuralforecast"),
    )


@pytest.mark.parametrize("precision", ["luq4", "luq4+bf16-mixed"])
@pytest.mark.parametrize("app", ["forecasting_app.py", "neuralforecast_app.py"])
def test_it_trains_unmodified(python: str, app: str, precision: str, tmp_path: Path) -> None:
    done = run_python(
        *("-m", "lightning_eff", "run", str(APPS / app)),
        cwd=tmp_path,
        python=python,
        timeout=600,
        PL_TRAINER_PRECISION=precision,
    )
    (report,) = reports(done)
    assert report["after"] < 0.8 * report["before"], report  # it learned
    trained = re.search(r"luq4: (\d+) layers trained for (\d+) steps", done.stdout)
    assert trained is not None, done.stdout[-2000:]
    assert int(trained[1]) > 10
    assert int(trained[2]) == report["steps"]
