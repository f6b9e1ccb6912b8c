"""The file of recorded times: exact round trips, and every way in which a file can be cut short or wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lightning_eff.errors import ConfigurationError, EffWarning
from lightning_eff.functional.stragglers.timings import (
    COLUMNS,
    append_timings,
    check_target,
    read_timings,
    write_timings,
)

HEADER = ",".join(COLUMNS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.csv"


def table(steps: int = 3, ranks: int = 2, micro_batches: int = 4) -> torch.Tensor:
    return torch.rand(steps, ranks, micro_batches, dtype=torch.float64)


def test_a_round_trip_is_exact(path: Path) -> None:
    seconds, other = table() * 1e-3, torch.rand(3, dtype=torch.float64)
    write_timings(path, seconds, other)
    found = read_timings(path)
    assert torch.equal(found.table, seconds)
    assert torch.equal(found.other, other)
    assert path.read_text().splitlines()[0] == HEADER
    assert len(path.read_text().splitlines()) == 1 + 3 * 2 * 4


def test_appended_steps_follow(path: Path) -> None:
    first, second = table(2), table(3)
    write_timings(path, first, 0.1, append=True)
    write_timings(path, second, 0.2, first_step=2, append=True)
    found = read_timings(str(path))
    assert torch.equal(found.table, torch.cat([first, second]))
    assert found.other.tolist() == [0.1] * 2 + [0.2] * 3


def test_without_append_the_file_is_replaced(path: Path) -> None:
    write_timings(path, table(5))
    write_timings(path, last := table(2), first_step=9)
    assert torch.equal(read_timings(path).table, last)


def test_a_file_cut_anywhere_holds_its_complete_steps(path: Path) -> None:
    seconds = table(3, 2, 2)
    write_timings(path, seconds, 0.5)
    text = path.read_text()
    ends = [i for i, letter in enumerate(text, start=1) if letter == "\n"]
    for cut in range(len(text) + 1):
        path.write_text(text[:cut])
        rows = max(0, sum(end <= cut for end in ends) - 1)
        if rows == 2:  # rank 0 complete and no sign yet of a rank 1
            assert read_timings(path).table.shape == (1, 1, 2)
        elif rows == 1:
            assert read_timings(path).table.shape == (1, 1, 1)
        elif rows < 4:
            with pytest.raises(ConfigurationError, match="no complete|no row"):
                read_timings(path)
        else:
            assert torch.equal(read_timings(path).table, seconds[: rows // 4])


def test_a_resumed_run_goes_over_the_torn_end(path: Path) -> None:
    before, after = table(4), table(3)
    write_timings(path, before, 0.5)
    path.write_text(path.read_text()[:-9])  # killed in the last row of step 3
    write_timings(path, after, 0.25, first_step=2, append=True)  # resumed from the checkpoint after step 1
    found = read_timings(path)
    assert torch.equal(found.table, torch.cat([before[:2], after]))
    assert found.other.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25]


def test_appending_to_a_torn_header_writes_it_again(path: Path) -> None:
    path.write_text("step,ra")
    write_timings(path, seconds := table(), append=True)
    assert torch.equal(read_timings(path).table, seconds)


def test_other_programs_write_it_differently(path: Path) -> None:
    seconds = table(2, 2, 2)
    write_timings(path, seconds, 0.5)
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    random.shuffle(rows)
    order = [3, 0, 4, 2, 1]
    lines = [",".join(f' "{line[k]}"' for k in order) for line in [list(COLUMNS), *rows]]
    path.write_bytes(b"\xef\xbb\xbf" + ("\r\n".join(lines) + "\r\n\r\n").encode())
    found = read_timings(path)
    assert torch.equal(found.table, seconds)
    assert found.other.tolist() == [0.5, 0.5]


def test_the_other_column_may_be_missing(path: Path) -> None:
    path.write_text("step,rank,micro_batch,seconds\n5,0,0,1.5\n5,0,1,2\n")
    found = read_timings(path)
    assert found.table.tolist() == [[[1.5, 2.0]]]
    assert found.other.tolist() == [0.0]


def test_the_short_end_of_an_epoch_is_left_out(path: Path) -> None:
    write_timings(path, first := table(2))
    write_timings(path, table(1, 2, 3), first_step=2, append=True)
    write_timings(path, second := table(2), first_step=3, append=True)
    assert torch.equal(read_timings(path).table, torch.cat([first, second]))


def lines_of(path: Path) -> list[str]:
    write_timings(path, table(3, 2, 2), 0.5)
    return path.read_text().splitlines(keepends=True)


def test_a_gap_is_an_error_that_names_it(path: Path) -> None:
    lines = lines_of(path)
    for missing, where in ((2, "step 0 has no rank 0, micro-batch 1"), (7, "step 1 has no rank 1, micro-batch 0")):
        path.write_text("".join(lines[:missing] + lines[missing + 1 :]))
        with pytest.raises(ConfigurationError, match=where):
            read_timings(path)


def test_gaps_in_every_step_are_those_of_a_run_with_dropping(path: Path) -> None:
    lines = lines_of(path)
    path.write_text("".join(line for k, line in enumerate(lines) if k not in {4, 8, 12}))
    with pytest.raises(ConfigurationError, match="step 0 has no rank 1, micro-batch 1.*without dropping"):
        read_timings(path)


def test_a_step_without_other_s_among_others(path: Path) -> None:
    lines = lines_of(path)
    lines[5] = lines[5].replace(",0.5\n", ",\n")
    path.write_text("".join(lines))
    with pytest.raises(ConfigurationError, match="step 1 has no other_s"):
        read_timings(path)


def test_a_step_with_more_than_the_others(path: Path) -> None:
    write_timings(path, table(3, 2, 2))
    write_timings(path, table(1, 3, 2), first_step=3, append=True)
    with pytest.raises(ConfigurationError, match="step 3 has 3 ranks with 2 micro-batches, most steps have 2 with 2"):
        read_timings(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("step,rank,micro_batch,second", "line 1: unknown column 'second'. Did you mean 'seconds'?"),
        ("step,rank,micro_batch", "line 1: column seconds is missing"),
        ("rank,seconds", "line 1: column step, micro_batch is missing"),
        ("step,rank,micro_batch,seconds,other", "unknown column 'other'. Did you mean 'other_s'?"),
        ("step,rank,micro_batch,seconds,rank", "line 1: a column stands there twice"),
        ("0,0,0,1.5", "line 1: unknown column '0'."),
    ],
)
def test_wrong_columns(path: Path, header: str, message: str) -> None:
    path.write_text(header + "\n0,0,0,1.5\n")
    with pytest.raises(ConfigurationError) as caught:
        read_timings(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,0,1,2.0", "line 3: 4 values for 5 columns"),
        ("0,0,1,2.0,,", "line 3: 6 values for 5 columns"),
        ("0,zero,1,2.0,", "line 3: rank 'zero' is not a whole number"),
        ("-1,0,1,2.0,", "line 3: step '-1' is not a whole number"),
        ("0,0,1.0,2.0,", "line 3: micro_batch '1.0' is not a whole number"),
        ("0,0," + "9" * 5000 + ",2.0,", "is not a whole number"),
        ("0,0,1,fast,", "line 3: seconds 'fast' is not a time"),
        ("0,0,1,,", "line 3: seconds '' is not a time"),
        ("0,0,1,nan,", "line 3: seconds 'nan' is not a time"),
        ("0,0,1,inf,", "line 3: seconds 'inf' is not a time"),
        ("0,0,1,-1.0,", "line 3: seconds '-1.0' is not a time"),
        ("0,0,1,2.0,-3", "line 3: other_s '-3' is not a time"),
    ],
)
def test_wrong_rows(path: Path, row: str, message: str) -> None:
    path.write_text(f"{HEADER}\n0,0,0,1.5,0.5\n{row}\n0,1,0,1.5,\n")
    with pytest.raises(ConfigurationError) as caught:
        read_timings(path)
    assert message in str(caught.value)


def test_files_that_are_none(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_timings(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_timings(tmp_path)
    for content, message in (
        (b"", "no complete line"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a\x00b\n", "unknown column"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match=message):
            read_timings(path)
    path.write_text(HEADER + "\n")
    with pytest.raises(ConfigurationError, match="no row"):
        read_timings(path)


OTHERS = {
    "a program": b"import torch\nprint(1)",
    "a checkpoint": b"PK\x03\x04\n\xff\xfe",
    "one line": b"step",
    "another order": b"rank,step,micro_batch,seconds,other_s\n0,0,0,1.0,",
    "fewer columns": b"step,rank,micro_batch,seconds\n0,0,0,1.0",
}


@pytest.mark.parametrize("what", OTHERS)
def test_rows_are_not_added_to_another_file(path: Path, what: str) -> None:
    """``record_timings="train.py"`` would have cut off the last line of the program."""
    path.write_bytes(OTHERS[what])
    if what == "one line":  # a header torn by a killed run
        check_target(path)
        return
    for refused in (lambda: check_target(path), lambda: write_timings(path, table(), append=True)):
        with pytest.raises(ConfigurationError, match="holds something else.*Name another file"):
            refused()
    assert path.read_bytes() == OTHERS[what]


def test_where_nothing_can_be_written_is_said(path: Path) -> None:
    below = path / "below.csv"
    path.mkdir()
    for target, said in ((path, "not a file"), (path.parent / "none" / "x.csv", "there is no folder")):
        with pytest.raises(ConfigurationError, match=said):
            check_target(target)
        with pytest.raises(ConfigurationError, match="cannot be written"):
            write_timings(target, table())
        with pytest.warns(EffWarning, match="cannot be written.*The run goes on"):
            append_timings(target, table())
    check_target(below)
    append_timings(below, seconds := table())
    append_timings(below, seconds, first_step=3)
    assert torch.equal(read_timings(below).table, torch.cat([seconds, seconds]))


def test_a_disk_that_is_full(path: Path) -> None:
    path.symlink_to("/dev/full")
    with pytest.raises(ConfigurationError, match="No space left on device"):
        write_timings(path, table())
