"""The benchmark of strategy="pipelined_bp" runs on real ranks, at sizes at which its figures mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import pipelined_bp
from benchmarks._report import Report
from benchmarks.pipelined_bp import CENTRE, GPIPE, ONE, ONE_F_ONE_B, OURS, Result, Turn, Variant, Work

SLEEP = Work("sleep", 2, 256, 1, 0.0005)


@pytest.mark.long
def test_seconds_per_sample(tmp_path: Path) -> None:
    assert pipelined_bp.main(["--tiny", "--rounds", "1", "--check", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    found = {(row["settings"]["compute"], row["settings"]["samples"], row["pair"]): row for row in _rows(file)}
    ours = [f"pipelined_bp, {n} in flight" for n in (2, 1, 3)]
    peers = [(64 // m, f"{kind}, m={m} / one process") for kind in ("GPipe", "1F1B") for m in (2, 4, 8)]
    assert [key[1:] for key in found if key[0] == "sleep" and "m=8" not in key[2] and "tick" not in key[2]] == [
        *((16, f"{name} / one process") for name in ours),
        *(peer for peer in peers if "m=8" not in peer[1]),
    ]
    assert set(peers) < {key[1:] for key in found}
    assert [key for key in found if key[0] == "real"] == [("real", 16, "pipelined_bp, 2 in flight / one process")]
    ticks = {key[1:] for key in found if "tick" in key[2]}
    assert ticks == {(size, "one process: tick - sleeps") for size in (16, 64)} | {
        (16, f"{name}: tick - sleeps") for name in ours
    }
    assert all(row["value"]["median"] > 0 for row in found.values()), "a rank did not sleep, or the clock ran backwards"
    assert all(row["target"] is None for row in found.values()), "targets are for the size they were set at"
    (used,) = found["sleep", 16, f"{ours[0]} / one process"]["details"]["utilisation"]
    assert 0 < used < 1


def _rows(file: Path) -> list[dict]:
    return json.loads(file.read_text())["rows"]


def test_every_variant_follows_what_it_is_compared_with() -> None:
    found = pipelined_bp.variants(SLEEP, [4, 8, 16, 32])
    assert len(found) == len(set(found)) == 5 + 6 + 6
    assert all(found.index(v.base) <= found.index(v) for v in found)
    assert Variant(GPIPE, 8).base == Variant(ONE, 64)
    assert Variant(OURS, 8, 2).base == Variant(ONE, 8)
    four = pipelined_bp.variants(Work("sleep", 4, 256, 1, 0.0005), [4, 8, 16, 32])
    assert four == [Variant(ONE, 16), CENTRE, Variant(ONE, 64), Variant(ONE_F_ONE_B, 8)]


def test_rows_are_checked_against_targets() -> None:
    """One process takes 50 ms for 16 samples; ours takes 25 and GPipe, for 64, 125, less than 1F1B."""
    result = Result(
        SLEEP,
        {
            Variant(ONE, 16): [Turn(0.050 / 16)],
            CENTRE: [Turn(0.025 / 16, 0.9)],
            Variant(ONE, 64): [Turn(0.200 / 64)],
            Variant(GPIPE, 8): [Turn(0.125 / 64)],
            Variant(ONE_F_ONE_B, 8): [Turn(0.150 / 64)],
        },
    )
    options = pipelined_bp.parse([])
    report = Report("pipelined_bp", ())
    pipelined_bp.add_rows(report, result, options)
    rows = {row.pair: row for row in report.rows if row.settings["samples"] != 64}
    ours = "pipelined_bp, 2 in flight"
    checked = {pair: (row.value.median, row.ok) for pair, row in rows.items() if row.target is not None}
    assert checked == {
        f"{ours} / one process": (pytest.approx(25 / 50), True),
        f"{ours} / GPipe, m=8": (pytest.approx((25 / 50) / (125 / 200)), True),
        f"{ours}: tick - sleeps": (pytest.approx(1.0), True),
    }
    assert rows[f"{ours} / one process"].settings["with flush"] == "1.600x"
    assert rows["GPipe, m=8 / one process"].settings["with flush"] == "1.778x"
    assert rows["one process: tick - sleeps"].value.median == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--device", "cuda"], "cpu only"), (["--sizes", "12"], "divide 64"), (["--compute", "gpu"], "unknown compute")],
)
def test_what_it_cannot_do_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pipelined_bp.main(arguments)
    assert said in capsys.readouterr().err
