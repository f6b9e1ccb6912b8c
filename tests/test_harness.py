"""The harness keeps its own promises: ranks are real, failures are told, leaks are caught."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.harness import FIXED_SEED, RanksFailedError, Snapshot, keep_globals, limit, run_ranks
from tests.harness.leaks import ROOT
from tests.harness.turns import Turns

# ------------------------------------------------------------------------------------------------------------- ranks


def _sum_of_ranks(rank: int, world_size: int, scale: float, *, offset: float) -> tuple[int, float, str]:
    value = torch.tensor(rank * scale + offset, dtype=torch.float64)
    dist.all_reduce(value)
    return os.getpid(), value.item(), os.environ["WORLD_SIZE"]


def _draw(rank: int, world_size: int) -> torch.Tensor:
    return torch.rand(3)


def _raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the number is wrong")
    dist.barrier()


def _die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def _hang_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(1000)


def _leak(rank: int, world_size: int) -> None:
    os.environ["LEFT_BEHIND"] = "1"


def _group_of_its_own(rank: int, world_size: int) -> tuple[bool, str]:
    return dist.is_initialized(), os.environ["EXTRA"]


def test_ranks_are_processes_that_reduce() -> None:
    first = run_ranks(_sum_of_ranks, 2, 10.0, offset=1.0)
    again = run_ranks(_sum_of_ranks, 2, 10.0, offset=1.0)
    assert [value for _, value, _ in first] == [12.0, 12.0]
    assert {size for _, _, size in first} == {"2"}
    pids = [pid for pid, _, _ in first]
    assert len({*pids, os.getpid()}) == 3
    assert pids == [pid for pid, _, _ in again]  # started once, used again


def test_ranks_return_tensors_from_the_fixed_seed() -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(FIXED_SEED))
    for drawn in run_ranks(_draw):
        torch.testing.assert_close(drawn, expected, rtol=0, atol=0)


def test_a_rank_that_raises_is_reported() -> None:
    with pytest.raises(RanksFailedError, match=r"rank 1: ValueError[\s\S]*the number is wrong") as caught:
        run_ranks(_raise_on_one)
    assert caught.value.failures[1] == "ValueError"


def test_a_rank_that_dies_is_reported_and_replaced() -> None:
    with pytest.raises(RanksFailedError, match=r"rank 1: died\nexit code 7"):
        run_ranks(_die_on_one)
    assert [value for _, value, _ in run_ranks(_sum_of_ranks, 2, 1.0, offset=0.0)] == [1.0, 1.0]


def test_a_rank_that_hangs_is_killed_and_its_stack_shown() -> None:
    started = time.monotonic()
    with pytest.raises(RanksFailedError, match="_hang_on_one") as caught:
        run_ranks(_hang_on_one, timeout_s=1.0)
    assert caught.value.failures == {1: "hung"}
    assert time.monotonic() - started < 20.0


def test_a_rank_that_leaks_is_reported() -> None:
    with pytest.raises(RanksFailedError, match="environment: LEFT_BEHIND was None, is '1'"):
        run_ranks(_leak, 1)


def test_a_rank_may_form_its_own_group() -> None:
    assert run_ranks(_group_of_its_own, init_group=False, env={"EXTRA": "yes"}) == [(False, "yes")] * 2


# ------------------------------------------------------------------------------------------------------- leak police


def test_nothing_leaks_from_doing_nothing() -> None:
    assert Snapshot().leaks() == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda: os.environ.update(LEFT_BEHIND="1"), "environment: LEFT_BEHIND was None, is '1'"),
        (lambda: torch.set_default_dtype(torch.float64), "torch default dtype: was torch.float32, is torch.float64"),
        (lambda: torch.set_grad_enabled(False), "torch grad mode: was True, is False"),
        (lambda: torch.use_deterministic_algorithms(True, warn_only=True), "torch deterministic algorithms"),
        (lambda: torch.set_num_threads(2), "torch num_threads: was 1, is 2"),
        (lambda: torch.set_autocast_enabled("cpu", True), "torch autocast on cpu: was False, is True"),
        (lambda: os.chdir("/"), "working folder"),
    ],
)
def test_a_leak_is_told_once_and_put_back(change: Any, told: str) -> None:
    before = Snapshot()
    change()
    (leak,) = before.leaks()
    assert leak.startswith(told)
    assert before.leaks() == []


def test_a_process_group_left_behind_is_destroyed(tmp_path: Path) -> None:
    before = Snapshot()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert before.leaks() == ["default process group left initialised"]
    assert not dist.is_initialized()


def test_a_thread_left_running_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.harness.leaks.GRACE_S", 0.05)
    before, done = Snapshot(), threading.Event()
    thread = threading.Thread(target=done.wait, name="straggler")
    thread.start()
    assert "non-daemon thread left running: straggler" in before.leaks()[0]
    done.set()
    thread.join()


def test_a_child_left_running_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr("tests.harness.leaks.GRACE_S", 0.05)
    before = Snapshot()
    with subprocess.Popen(["sleep", "60"]) as child:
        assert "child process left running: sleep 60" in before.leaks()[0]
        child.kill()


def test_a_file_left_in_the_repository_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (ROOT / "pyproject.toml").exists()
    monkeypatch.setattr("tests.harness.leaks.ROOT", tmp_path)
    before = Snapshot()
    (tmp_path / "lightning_logs").mkdir()
    assert before.leaks() == ["file left in the repository: lightning_logs"]


def test_keep_globals_puts_back_in_silence() -> None:
    before = Snapshot()
    with keep_globals():
        torch.use_deterministic_algorithms(True)
        os.environ["LEFT_BEHIND"] = "1"
    assert before.leaks() == []


def test_a_test_that_leaks_fails(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from tests.conftest import _leak_police, _seeded")
    pytester.makepyfile(
        """
        import os

        def test_guilty():
            os.environ["LEFT_BEHIND"] = "1"

        def test_innocent():
            assert "LEFT_BEHIND" not in os.environ
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*this test leaks:", "*environment: LEFT_BEHIND was None, is '1'"])


# ---------------------------------------------------------------------------------------------------- limits and turns

OVER = """
import runpy, sys, time
limit = runpy.run_path(sys.argv[1])["Limit"](sys.stderr)
limit.begin(-9.9)
time.sleep(100)
"""


def test_a_test_that_exceeds_its_limit_ends_the_process_with_its_stack() -> None:
    command = [sys.executable, "-S", "-c", OVER, str(Path(limit.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert 'File "<string>", line 5' in done.stderr


def test_short_tests_share_a_timer_and_no_test_has_less_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ends = [0.0], [math.inf]
    set_anew: list[float] = []

    def timer(seconds: float, **_: Any) -> None:
        ends[0] = now[0] + seconds
        set_anew.append(now[0])

    monkeypatch.setattr(limit.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(limit.faulthandler, "dump_traceback_later", timer)
    monkeypatch.setattr(limit.faulthandler, "cancel_dump_traceback_later", lambda: ends.__setitem__(0, math.inf))
    ours = limit.Limit(sys.stderr)
    for limit_s in [120.0] * 6 + [1800.0, 120.0, 120.0]:
        ours.begin(limit_s)
        assert limit_s <= ends[0] - now[0] <= limit_s + limit.LATER_S
        now[0] += 4.0
    assert set_anew == [0.0, 12.0, 24.0, 28.0]
    ours.lift()  # it waits for its turn
    assert ends == [math.inf]
    ours.begin()
    assert ends[0] == now[0] + limit.LIMIT_S + limit.LATER_S


def test_who_wants_to_be_alone_waits_for_those_that_run_and_the_others_for_it(tmp_path: Path) -> None:
    one, two, three = (Turns(tmp_path) for _ in range(3))
    done: list[str] = []

    def take(turns: Turns, name: str, *, alone: bool) -> threading.Thread:
        def run() -> None:
            turns.begin(alone=alone)
            done.append(name)

        waits = threading.Event()
        turns._before_waiting = waits.set
        thread = threading.Thread(target=run)
        thread.start()
        assert waits.wait(20)
        return thread

    one.begin(alone=False)
    alone = take(two, "alone", alone=True)
    other = take(three, "other", alone=False)
    assert done == []
    one.end(alone_next=False)
    alone.join()
    two.end(alone_next=True)
    two.begin(alone=True)
    assert done == ["alone"]
    two.end(alone_next=False)
    other.join()
    one.begin(alone=False)  # beside the other
    assert done == ["alone", "other"]
    for turns in (one, two, three):
        turns.close()


# -------------------------------------------------------------------------------------------------------------- seeds


def test_every_test_starts_from_the_fixed_seed() -> None:
    assert torch.initial_seed() == FIXED_SEED


def test_a_statistical_test_runs_from_two_seeds(seed: int) -> None:
    assert torch.initial_seed() == seed
