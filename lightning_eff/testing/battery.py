"""What strategies and callbacks have to keep alike; each promise is one test of :class:`Battery`."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from lightning_eff.errors import ConfigurationError, EffError
from lightning_eff.methods import METHODS
from lightning_eff.testing.cases import Case
from lightning_eff.testing.ranks import run_ranks
from lightning_eff.testing.runs import Launcher, Outcome, Plan, differences, imported, made, run

__all__ = ["Battery", "plain_options", "require", "same_run"]

_SECTIONS = ("State", "Metrics", "References")
_COPIES = ("pickle", "deepcopy")


def require(condition: object, message: str) -> None:
    """Fail the test with ``message`` unless ``condition`` holds."""
    if not condition:
        pytest.fail(message, pytrace=False)


def same_run(found: Sequence[Outcome], wanted: Sequence[Outcome], what: str, *, skipped: int = 0) -> None:
    """Fail the test unless two runs agree to the bit on every rank: weights, optimizers, schedules, losses.

    Args:
        found: a run's outcome on every rank.
        wanted: of the run it has to be equal to.
        what: what is said if it is not.
        skipped: micro-batches of ``wanted`` that ``found`` began after.
    """
    told: list[str] = []
    for rank, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        told += differences(ours.weights, theirs.weights, f"rank {rank}: weights")
        told += differences(ours.losses, theirs.losses[skipped:], f"rank {rank}: losses")
        for key in ("optimizer_states", "lr_schedulers", "global_step"):
            told += differences(ours.checkpoint[key], theirs.checkpoint[key], f"rank {rank}: checkpoint[{key!r}]")
    require(not told, "\n".join([what, *told[:12]]))


def plain_options(value: object) -> dict[str, Any]:
    """Return the constructor's arguments that an object has as attributes: numbers, strings, None, or lists of them."""
    names = inspect.signature(type(value)).parameters
    return {name: item for name in names if _is_plain(item := getattr(value, name, value))}


def _is_plain(item: object) -> bool:
    if isinstance(item, Mapping):
        return all(_is_plain(inner) for inner in item.values())
    if isinstance(item, list | tuple):
        return all(_is_plain(inner) for inner in item)
    return item is None or isinstance(item, bool | int | float | str)


class Battery:
    """Tests that every method with a Trainer has to pass.

    Derive a class whose name begins with ``Test`` from one of its subclasses and give it ``case`` or ``cases``.

    Attributes:
        case: of the method.
        cases: of several methods, or several ways of using one.
        launch: starts processes; anything that can be called as :func:`lightning_eff.testing.ranks.run_ranks`.
    """

    case: ClassVar[Case | None] = None
    cases: ClassVar[Sequence[Case]] = ()
    launch: ClassVar[Launcher] = staticmethod(run_ranks)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Ask every promise of every case; those about cuts, packages of Lightning or refusals once for each."""
        per_case: dict[str, Callable[[Any], Iterable[str]]] = {
            "cut": lambda case: case.cut_after,
            "root": lambda case: case.paths,
            "conflict": lambda case: sorted({*case.info.conflicts, *case.refusals}),
        }
        cases = [*self.cases, *([self.case] if self.case is not None else [])]
        if not cases:
            raise ConfigurationError(f"{type(self).__name__} has no case. Give it one: case = StrategyCase(...).")
        for name, values in per_case.items():
            if name in metafunc.fixturenames:
                pairs = [(case, value) for case in cases for value in values(case)]
                metafunc.parametrize(("case", name), pairs, ids=[f"{case.id}-{value}" for case, value in pairs])
                return
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", cases, ids=[case.id for case in cases])

    def run(self, plan: Plan) -> list[Outcome]:
        """Return what every rank of a run was left with; equal plans are run once."""
        return run(plan, type(self).launch)

    # ------------------------------------------------------------------------------------------ the row

    def test_the_row_is_complete(self, case: Any) -> None:
        """Summary, paper and card are there; keys and metrics are on the card; the class carries the row."""
        info = case.info
        require(info.summary.endswith("."), f"{info.name}: the summary is not a sentence: {info.summary!r}")
        require(case.card_path.is_file(), f"{info.name} has no card {case.card_path}")
        found = _sections(case.card_path)
        require(all(found.get(name) for name in _SECTIONS), f"{case.card_path}: needs the sections {_SECTIONS}")
        if info.paper:  # a method may be its authors' own
            (address, *_) = re.findall(r"https?://\S+", info.paper) or [""]
            dated = re.search(r"\b(19|20)\d\d\b", info.paper)
            require(address and dated, f"{info.name}: a paper without year or address: {info.paper!r}")
            require(address in found["References"], f"{case.card_path} does not cite {info.paper}")
        for name, keys in {"State": info.state_keys, "Metrics": info.metrics}.items():
            missing = [key for key in keys if f"`{key}`" not in found[name]]
            require(not missing, f"{case.card_path} does not tell of {missing} under {name}")
        require(
            all(key.startswith(f"eff/{info.name}/") for key in info.metrics),
            f"{info.name}: metrics of the row do not begin with eff/{info.name}/",
        )
        shell = info.load_mixin()
        require(shell.__doc__, f"{info.name}: {shell.__name__} has no docstring")
        carried = getattr(made(case.plan()), "info", None)
        require(carried is info, f"{info.name}: the object carries {carried!r} in place of its row")

    def test_wrong_options_are_named(self, case: Any) -> None:
        """A ConfigurationError says which argument it does not take."""
        for name, value in case.wrong.items():
            plan = case.plan(options={**case.options, name: value})
            try:
                made(plan)
            except ConfigurationError as error:
                require(name in str(error), f"{case.id}: the error about {name}={value!r} does not name it: {error}")
            else:
                pytest.fail(f"{case.id} takes {name}={value!r}", pytrace=False)

    # ------------------------------------------------------------------------------------------ bits

    def neutral_plans(self, case: Any, root: str) -> tuple[Plan, Plan]:
        """Return the neutral run and plain Lightning's."""
        plain = case.plain_plan(root, **({} if case.plain is None else {"trainer": case.plain}))
        return case.plan(root, case.neutral), plain

    def test_the_neutral_setting_is_plain_lightning(self, case: Any, root: str) -> None:
        """Weights, the optimizer's state, learning rates and logged losses are the same bits."""
        if case.neutral is None:
            require(case.no_neutral, f"{case.id}: no neutral setting, and no_neutral does not say why")
            pytest.skip(case.no_neutral)
        ours, plain = (self.run(plan) for plan in self.neutral_plans(case, root))
        same_run(ours, plain, f"{case.id}: the neutral setting is not plain Lightning")
        for key, values in plain[0].logged.items():
            if not key.startswith("eff/"):
                told = differences(ours[0].logged.get(key), values, f"logged {key}")
                require(not told, f"{case.id}: {told}")

    def test_at_work_it_changes_what_it_says(self, case: Any) -> None:
        """With the case's options the other tests compare runs that the method has a part in."""
        ours, plain = self.run(case.plan()), self.run(case.plain_plan())
        same = not differences(ours[0].weights, plain[0].weights)
        require(same != case.changes, f"{case.id}: changes={case.changes}, but the weights are {'' if same else 'not '}"
                "those of plain Lightning")  # fmt: skip

    def test_both_packages_train_to_the_same_bits(self, case: Any, root: str) -> None:
        """The class of each package of Lightning is based on that package's, and computes the same."""
        require(
            any(base.__module__.startswith(root) for base in imported(case.paths[root]).__mro__),
            f"{case.paths[root]} has no base class of {root}",
        )
        same_run(self.run(case.plan(root)), self.run(case.plan()), f"{case.id}: {root} and {case.root} differ")

    def test_evaluation_leaves_no_trace(self, case: Any) -> None:
        """Validation between the steps, over other data, changes neither the weights nor what is remembered."""
        every = 2 * case.trainer.get("accumulate_grad_batches", 1)
        between = {**case.trainer, "limit_val_batches": 3, "val_check_interval": every}
        with_it, without = self.run(case.plan(trainer=between)), self.run(case.plan())
        require("val_loss" in with_it[0].logged, f"{case.id}: nothing was evaluated")
        same_run(with_it, without, f"{case.id}: evaluation changes the run")
        ours, theirs = (case.state_of(found[0].checkpoint) for found in (with_it, without))
        told = differences(ours, theirs, "state")
        require(not told, f"{case.id}: evaluation changes the state: {told[:8]}")

    # ------------------------------------------------------------------------------------------ checkpoints

    def saved(self, case: Any, **changes: Any) -> list[Outcome]:
        """Return the run that saved a checkpoint after each of the case's cuts."""
        return self.run(case.plan(saves=tuple(case.cut_after), **changes))

    def resumed(self, case: Any, cut: int, plan: Plan) -> None:
        """Fail the test unless ``plan``, a run from the checkpoint after ``cut``, ends as the uncut run does."""
        whole = self.run(case.plan(world=plan.world))
        continued = self.run(plan)
        what = f"{case.id}: cut after step {cut}, it does not go on to the same bits"
        same_run(continued, whole, what, skipped=cut * len(whole[0].losses) // case.steps)
        ours, theirs = (case.state_of(found[0].checkpoint) for found in (continued, whole))
        told = differences(ours, theirs, "state")
        require(not told, "\n".join([f"{what}: its state at the end is another", *told[:8]]))

    def test_saving_changes_nothing(self, case: Any) -> None:
        """A run that saves checkpoints ends as one that does not."""
        same_run(self.saved(case), self.run(case.plan()), f"{case.id}: to save a checkpoint changes the run")

    def test_a_run_cut_anywhere_continues_to_the_same_bits(self, case: Any, cut: int) -> None:
        """Another process with another seed, going on from the checkpoint after step ``cut``."""
        path = self.saved(case)[0].saved(cut)
        self.resumed(case, cut, case.plan(resume=path, seed=4))

    def test_one_package_resumes_the_other(self, case: Any) -> None:
        """A checkpoint belongs to the method, not to a package of Lightning."""
        if len(case.paths) < 2:
            pytest.skip(f"it has a class for {case.root} alone")
        cut = case.cut_after[1]
        self.resumed(case, cut, case.plan(list(case.paths)[1], resume=self.saved(case)[0].saved(cut), seed=4))

    def test_the_state_in_a_checkpoint_is_that_of_the_row(self, case: Any) -> None:
        """It is read with ``weights_only=True``, has the row's keys, and the row takes it."""
        for cut in case.cut_after:
            state = case.state_of(torch.load(self.saved(case)[0].saved(cut), weights_only=True))
            keys = set() if state is None else set(state)
            require(
                keys == case.state_keys,
                f"{case.id}: after step {cut} a checkpoint has {sorted(keys)}, the row {sorted(case.state_keys)}",
            )
            if state is not None:
                case.info.read_state(state)

    def test_plain_lightning_goes_on_and_back_again(self, case: Any) -> None:
        """A plain Trainer passes over the method's state; the method begins anew in a plain checkpoint."""
        cut = case.cut_after[1]
        plain = case.plain_plan(resume=self.saved(case)[0].saved(cut), saves=(case.steps // 2,))
        on = self.run(plain)
        steps = on[0].checkpoint["global_step"]
        require(steps == case.steps, f"{case.id}: plain Lightning ends at step {steps}")
        require(case.state_of(on[0].checkpoint) is None, f"{case.id}: plain Lightning saves the method's state")
        if case.no_way_back:
            return
        back = self.run(case.plan(resume=on[0].saved(case.steps // 2)))
        steps = back[0].checkpoint["global_step"]
        require(steps == case.steps, f"{case.id}: resumed from plain Lightning it ends at step {steps}")

    # ------------------------------------------------------------------------------------------ objects

    @pytest.mark.parametrize("how", _COPIES)
    def test_a_copy_trains_as_the_original(self, case: Any, how: Any) -> None:
        """Of an object that was never used."""
        same_run(self.run(case.plan(copy=how)), self.run(case.plan()), f"{case.id}: a copy by {how} differs")

    def test_the_command_line_takes_the_class(
        self, case: Any, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """``class_path`` and ``init_args`` in a YAML file make the object that Python makes."""
        path = case.paths[root]
        config = {"class_path": path.replace(":", "."), "init_args": _as_in_yaml(case.at_work)}
        given: Any = config if case.kind == "strategy" else [config]
        found = self.from_yaml(case, root, {self.trainer_option(case): given}, tmp_path, monkeypatch)
        require(type(found) is imported(path), f"{case.id}: YAML made a {type(found)}")
        told = differences(plain_options(found), plain_options(made(case.plan(root))), "attributes")
        require(not told, f"{case.id}: YAML made another object: {told}")

    def trainer_option(self, case: Any) -> str:
        """Return the name of the Trainer's option that takes the method."""
        return {"callback": "callbacks", "precision": "plugins"}.get(case.kind, str(case.kind))

    def from_yaml(
        self, case: Any, root: str, trainer: Mapping[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Any:
        """Return the method's object of a Trainer that LightningCLI made from a file."""
        pytest.importorskip("jsonargparse")
        yaml = pytest.importorskip("yaml")
        for module in case.imports:
            importlib.import_module(module)
        monkeypatch.setattr("sys.argv", ["app.py"])
        (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": dict(trainer)}))
        command: Any = importlib.import_module(f"{root}.cli").LightningCLI
        module = type(imported(case.task)(root, **case.task_options))
        quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        app = command(module, run=False, args=[f"--config={folder / 'config.yaml'}"], trainer_defaults=quiet)
        if case.kind == "strategy":
            return app.trainer.strategy
        if case.kind == "precision":
            return app.trainer.precision_plugin
        kind = imported(case.paths[root])
        return next((callback for callback in app.trainer.callbacks if type(callback) is kind), None)

    # ------------------------------------------------------------------------------------------ refusals and figures

    def test_every_conflict_of_the_row_is_refused(self, case: Any, conflict: str) -> None:
        """Before the first step, with a typed error that names the method."""
        require(conflict in case.info.conflicts, f"{case.id}: provokes {conflict!r}, which is no conflict of the row")
        require(conflict in case.refusals, f"{case.id}: no provocation for the conflict {conflict!r} of the row")
        provoke = case.refusals[conflict]
        kinds, message, steps = _called(case, provoke.call) if provoke.call else self._refused(case, provoke)
        require(kinds, f"{case.id}: {conflict!r} is not refused")
        typed = provoke.error in kinds and EffError.__name__ in kinds
        require(typed, f"{case.id}: {conflict!r} is to end in {provoke.error}, and does in {kinds[:1]}: {message}")
        names = (case.info.name, case.info.class_name, *case.named)
        named = any(name in message for name in names)
        require(named, f"{case.id}: the refusal of {conflict!r} does not name the method: {message}")
        require(steps == 0, f"{case.id}: {conflict!r} is refused only after step {steps}")

    def _refused(self, case: Any, provoke: Any) -> tuple[tuple[str, ...], str, int]:
        plan = case.plan(
            options={**case.options, **provoke.options},
            trainer={**case.trainer, **provoke.trainer},
            task_options={**case.task_options, **provoke.task},
            world=provoke.world or case.world,
            may_fail=True,
        )
        refusals = [outcome.refusal for outcome in self.run(plan)]
        first = refusals[0]
        if first is None or None in refusals:  # one that goes on would wait for the others
            return (), "", 0
        return first.kinds, first.message, max(refusal.steps for refusal in refusals if refusal is not None)

    def test_every_logged_figure_is_documented_and_the_other_way_round(self, case: Any) -> None:
        """Keys that begin with ``eff/`` are those of the row."""
        of_others = tuple(f"eff/{name}/" for name in METHODS if name != case.info.name)
        figures = self.run(case.plan())[0].logged
        logged = {key for key in figures if key.startswith("eff/")}
        documented = set(case.info.metrics)
        unknown = {key for key in logged - documented if not key.startswith(of_others)}
        require(not unknown, f"{case.id} logs what its row does not document: {sorted(unknown)}")
        silent = documented - logged - set(case.unlogged)
        require(not silent, f"{case.id} does not log what its row documents: {sorted(silent)}")
        broken = sorted(key for key in logged if not all(map(math.isfinite, figures[key])))
        require(not broken, f"{case.id} logs what is not finite: {broken}")
        invented = set(case.unlogged) - documented
        require(not invented, f"{case.id}: unlogged names what the row does not document: {sorted(invented)}")


def _called(case: Any, call: Callable[[Any], object]) -> tuple[tuple[str, ...], str, int]:
    try:
        call(made(case.plan()))
    except Exception as error:  # noqa: BLE001 - which it is, is what the test looks at
        return tuple(kind.__name__ for kind in type(error).__mro__), str(error), 0
    return (), "", 0


def _sections(card: Path) -> dict[str, str]:
    parts = re.split(r"^## +(.+?) *$", card.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], (body.strip() for body in parts[2::2]), strict=True))


def _as_in_yaml(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as YAML writes them: tuples are lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
