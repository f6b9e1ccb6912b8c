"""What callbacks and precision plugins keep alike: each rank has one, and copies belong to no run."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_eff.testing.battery import Battery, require, same_run
from lightning_eff.testing.runs import differences

__all__ = ["ReplicaBattery"]


class ReplicaBattery(Battery):
    """Tests of methods that every replica has one of."""

    def test_two_ranks_stay_replicas_and_resume(self, case: Any) -> None:
        """Under data parallelism, each with its own part of the data."""
        if case.alone:
            pytest.skip(case.alone)
        first, second = self.run(case.plan(world=2))
        told = differences(second.weights, first.weights, "weights of the two ranks")
        require(not told, f"{case.id}: {told[:4]}")
        cut = case.cut_after[1]
        path = self.saved(case, world=2)[0].saved(cut)
        self.resumed(case, cut, case.plan(world=2, resume=path, seed=4))

    @pytest.mark.parametrize("how", ["pickle, used", "deepcopy, used"])
    def test_a_copy_of_a_used_one_begins_a_new_run(self, case: Any, how: Any) -> None:
        """It trains as a new object does."""
        same_run(self.run(case.plan(copy=how)), self.run(case.plan()), f"{case.id}: a copy by {how} differs")
