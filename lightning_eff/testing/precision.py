"""The batteries of precision plugins: what every one has to keep, and more of those that convert layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.testing.battery import require, same_run
from lightning_eff.testing.replicas import ReplicaBattery
from lightning_eff.testing.runs import differences, imported, train
from lightning_eff.testing.tasks import net

__all__ = ["PrecisionBattery", "distance", "net_options", "new_plugin"]

_LOSS_SCALERS = ("16-mixed", "16-true")


def distance(found: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the Euclidean distance between two sets of weights."""
    return math.sqrt(sum(float((found[name] - other[name]).double().square().sum()) for name in found))


class PrecisionBattery(ReplicaBattery):
    """Tests that every precision plugin has to pass."""

    def test_the_string_trains_repeatably_and_gives_the_types_back(self, case: Any, root: str, tmp_path: Path) -> None:
        """Twice to the same weights; after the run every layer is torch's again."""
        plan = case.string_plan(root)
        (first,) = self.run(plan)
        foreign = {name: kind for name, kind in first.layers.items() if not kind.startswith("torch.nn.")}
        require(not foreign, f"{case.id}: after the run layers are {foreign}")
        require(all(w.isfinite().all() for w in first.weights.values()), f"{case.id}: weights are not finite")
        same_run([train(0, 1, plan, str(tmp_path))], [first], f"{case.id}: a second run differs")
        (plain,) = self.run(case.plain_plan(root))
        require(differences(first.weights, plain.weights), f"{case.id}: the string changes nothing")

    def test_the_class_is_the_string(self, case: Any) -> None:
        """An object of the class, with the options that the string means, trains as the string does."""
        same_run(self.run(case.plan(options={})), self.run(case.string_plan()), f"{case.id}: class and string differ")

    def test_every_composition_trains(self, case: Any) -> None:
        """On every Lightning precision of the row losses fall; with a loss scaler the string is refused."""
        for base in case.info.composes_with:
            options = {**case.task_options, "dropout": 0.0}
            (outcome,) = self.run(case.string_plan(base=base, task_options=options))
            losses, part = outcome.losses, case.steps // 3
            require(all(map(math.isfinite, losses)), f"{case.id}+{base}: losses are not finite")
            require(sum(losses[-part:]) < sum(losses[:part]), f"{case.id}+{base}: losses do not fall: {losses}")
        for base in _LOSS_SCALERS:
            refused = self.run(case.string_plan(base=base, may_fail=True))[0].refusal
            named = refused is not None and case.info.name in refused.message
            typed = refused is not None and UnsupportedCombinationError.__name__ in refused.kinds
            require(named and typed, f"{case.id}+{base} is not refused: {refused}")

    def test_training_stays_close_to_float32(self, case: Any) -> None:
        """Closer than with the noise of four bits, which is measured beside it."""
        start = {f"net.{name}": value for name, value in net(**net_options(case.task_options)).state_dict().items()}
        plain, ours = self.run(case.plain_plan())[0].weights, self.run(case.string_plan())[0].weights
        four_bits = self.run(case.plain_plan(string="luq4"))[0].weights
        found = distance(ours, plain), distance(four_bits, plain), distance(plain, start)
        require(0 < found[0] <= found[1] < found[2], f"{case.id}: distances of it, luq4 and the start: {found}")

    def test_what_is_remembered_is_needed(self, case: Any) -> None:
        """Negative control of the resumes: without the memory the run says so, and ends at other weights."""
        if case.remembering is None:
            pytest.skip("it remembers nothing")
        plan = case.plan(options=case.remembering)
        (whole,), (saved,) = self.run(plan), self.run(replace(plan, saves=tuple(case.cut_after)))
        changed = []
        for cut in case.cut_after:
            checkpoint = torch.load(saved.saved(cut), weights_only=True)
            memory = case.state_of(checkpoint)["memory"]
            require(set(memory) >= {"net.3", "net.6"}, f"{case.id}: it remembers {sorted(memory)}")
            memory.clear()
            torch.save(checkpoint, path := saved.saved(cut) + ".lost")
            (continued,) = self.run(replace(plan, resume=path, seed=4))
            told = any("the resume is not exact" in message for message in continued.warned)
            require(told, f"{case.id}: nobody says that the memory is missing: {continued.warned}")
            changed += differences(continued.weights, whole.weights)
        require(changed, f"{case.id}: what it remembers changes nothing, wherever the run is cut")

    def test_the_command_line_takes_the_string(
        self, case: Any, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In a YAML file, for both packages."""
        found = self.from_yaml(case, root, {"precision": case.info.name}, tmp_path, monkeypatch)
        named = getattr(found, "eff_method", None)
        require(named == case.info.name, f"{case.id}: the string made a plugin of {named}")

    def test_ranks_remember_the_same(self, case: Any) -> None:
        """Any rank may be asked for the state: it has drawn and predicted what the others have."""
        if case.alone:
            pytest.skip(case.alone)
        first, second = self.run(case.plan(world=2))
        told = differences(second.own_state, first.own_state, "states of ranks 1 and 0")
        require(not told, f"{case.id}: {told[:8]}")
        require(set(first.own_state) == case.state_keys, f"{case.id}: its state has {sorted(first.own_state)}")


def net_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a task that shape its layers."""
    return {name: value for name, value in options.items() if name in ("width", "dropout", "bias")}


def new_plugin(case: Any, **options: Any) -> Any:
    """Return a plugin of the case's first package, every layer converted."""
    return imported(case.paths[case.root])(**{**case.at_work, "exempt_first_last": False, **options})
