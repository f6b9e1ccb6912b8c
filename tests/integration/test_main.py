"""``python -m lightning_eff list | explain | doctor``, and what ``run`` says before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_eff.__main__ import main
from lightning_eff.methods import METHODS


def test_list_names_every_method(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for info in METHODS.values():
        assert info.class_name in out
        assert info.summary in out
    assert 'precision="luq4"' in out


@pytest.mark.parametrize("name", ["luq4", "LUQ4", "luq4+bf16-mixed"])
def test_explain_tells_what_the_row_and_the_card_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name]) == 0
    out = " ".join(capsys.readouterr().out.split())  # long reasons are wrapped
    info = METHODS["luq4"]
    for said in (*info.strings, *info.conflicts.values(), *info.metrics, "arxiv.org/abs/2112.10769"):
        assert said in out


@pytest.mark.parametrize("name", METHODS)
def test_explain_knows_every_method(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name]) == 0
    out = " ".join(capsys.readouterr().out.split())
    info = METHODS[name]
    assert info.usage in out
    assert (info.paper or "none: the method is this package's own").split()[-1] in out


@pytest.mark.parametrize("name", ["LUQPrecision", "dropcomputestrategy", "NonFiniteGuard", "FP8Precision"])
def test_explain_knows_classes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first of its strings, where a class has several."""
    info = next(info for info in METHODS.values() if info.class_name.lower() == name.lower())
    assert main(["explain", name]) == 0
    assert f"{info.name}: {info.summary}" in " ".join(capsys.readouterr().out.split())


def test_the_nearest_class_is_named_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "LUQFineTunning"]) == 2
    assert "Did you mean 'LUQFineTuning'?" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["60", "200", ""])
def test_columns_are_honoured(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["list"]) == 0
    width = max(map(len, capsys.readouterr().out.splitlines()))
    assert width <= int(columns or 120)
    assert width > int(columns or 120) - 40 or columns == "200", "wide enough for what there is"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("lightning-eff ")


def test_explain_prints_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    card = Path(main.__code__.co_filename).parent / "cards" / "luq4.md"
    main(["explain", "luq4"])
    heading = next(line.lstrip("# ") for line in card.read_text().splitlines() if line.startswith("#"))
    assert heading in capsys.readouterr().out


def test_explain_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "luq5"]) == 2
    assert "Did you mean 'luq4'?" in capsys.readouterr().err


def test_doctor_reports_versions_namespaces_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_eff.kernels import describe

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for root in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        line = next(line for line in out.splitlines() if f"strings in {root} " in line)
        assert line.rstrip().endswith("ready")
    for what in (*describe(), "torch", "jsonargparse"):
        assert what in out


def test_doctor_prints_any_folder(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"cache": "/tmp/[/b]/[red]", "cache state": "/caf\udce9 cannot be used"}  # the second: bytes in Latin-1
    monkeypatch.setattr("lightning_eff.kernels.describe", lambda: facts)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "/tmp/[/b]/[red]" in out
    assert "/caf\\udce9 cannot be used" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "no_such.py"], "There is no script 'no_such.py'"),
        (["run", "-m", "no_such_module.train"], "There is no module 'no_such_module.train'"),
    ],
)
def test_run_says_what_it_cannot_find(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "usage: python -m lightning_eff" in capsys.readouterr().err
