"""The battery of strategies: what every one has to keep, asked with two processes and with one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_eff.testing.battery import Battery, plain_options, require, same_run
from lightning_eff.testing.runs import Plan, differences, imported

__all__ = ["StrategyBattery"]


class StrategyBattery(Battery):
    """Tests that every strategy has to pass.

    Example:
        In a test module of yours::

            from lightning_eff.testing import Provocation, StrategyBattery, StrategyCase


            class TestMine(StrategyBattery):
                case = StrategyCase(
                    info=MINE,  # your MethodInfo
                    classes={"lightning.pytorch": "my_package:MyStrategy"},
                    imports=("my_package",),
                    options={"delay": 2},
                    neutral={"delay": 0},
                    refusals={"manual_optimization": Provocation(task={"manual": True})},
                )
    """

    def neutral_plans(self, case: Any, root: str) -> tuple[Plan, Plan]:
        """See :class:`Battery`; a neutral setting may be one for another number of processes."""
        ranks = case.num_ranks if case.neutral_ranks is None else case.neutral_ranks
        ours, plain = super().neutral_plans(case, root)
        return replace(ours, world=ranks), replace(plain, world=ranks)

    def test_all_ranks_end_with_the_same_weights(self, case: Any) -> None:
        """Whatever each has computed."""
        first, *others = self.run(case.plan())
        for rank, other in enumerate(others, start=1):
            told = differences(other.weights, first.weights, f"weights of ranks {rank} and 0")
            require(not told, f"{case.id}: {told[:4]}")

    def test_one_process_emulates_many(self, case: Any) -> None:
        """To the same weights, optimizer state and losses."""
        if not case.emulated:
            pytest.skip("it is not emulated by one process")
        many, (one,) = self.run(case.plan()), self.run(case.plan(world=1))
        same_run(many[:1], [one], f"{case.id}: one process does not compute what {case.num_ranks} do")

    def test_a_checkpoint_of_many_is_resumed_by_one(self, case: Any) -> None:
        """And the other way round, where one process emulates many."""
        if not case.emulated:
            pytest.skip("it is not emulated by one process")
        cut = case.cut_after[1]
        for saving, going_on in ((case.num_ranks, 1), (1, case.num_ranks)):
            path = self.saved(case, world=saving)[0].saved(cut)
            self.resumed(case, cut, case.plan(world=going_on, resume=path, seed=4))

    def test_the_string_is_the_class(self, case: Any, root: str) -> None:
        """``Trainer(strategy="name")`` trains, with the class's own defaults."""
        for string in case.known_as:
            trained = self.run(case.plain_plan(root, string=string))
            require(
                all(weight.isfinite().all() for weight in trained[0].weights.values()),
                f"{case.id}: strategy={string!r} trains to weights that are not finite",
            )

    def test_the_command_line_takes_the_string(
        self, case: Any, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In a YAML file, for both packages."""
        kind = imported(case.paths[root])
        for string in case.known_as:
            found = self.from_yaml(case, root, {"strategy": string}, tmp_path, monkeypatch)
            require(type(found) is kind, f"{case.id}: strategy={string!r} made a {type(found)}")
            told = differences(plain_options(found), plain_options(kind()), "attributes")
            require(not told, f"{case.id}: strategy={string!r} has other options than the class: {told}")
