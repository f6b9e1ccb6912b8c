"""What a battery has to be told about one method: options, how each refusal is provoked, what differs from others."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from lightning_eff.methods import MethodInfo
from lightning_eff.testing.runs import STEPS, Plan

__all__ = ["CallbackCase", "Case", "PrecisionCase", "Provocation", "StrategyCase", "collect_cases"]


@dataclass(frozen=True, kw_only=True)
class Provocation:
    """A run, or a call, that the method must refuse before its first step.

    Attributes:
        trainer: options of the Trainer, beside or in place of the case's.
        task: options of the task.
        options: arguments of the method.
        world: number of processes; 0 for as many as the case has.
        call: called with a new object of the method in place of a run.
        error: name of the error that is raised, or of one above it.
    """

    trainer: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    world: int = 0
    call: Callable[[Any], object] | None = None
    error: str = "UnsupportedCombinationError"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method, or one way of using it, for a battery.

    Attributes:
        info: row of the method. It needs not be in ``METHODS``.
        options: arguments with which the method is at work, to the same bits every time: no wall clock.
        neutral: arguments with which a run is plain Lightning's to the bit; None if there are none.
        no_neutral: why there are none.
        plain: options of the plain Trainer that the neutral one is compared with, in place of ``trainer``.
        changes: whether a run with ``options`` ends at other weights than plain Lightning.
        variant: tells several cases of a method apart.
        classes: package of Lightning -> ``"module:Class"``; by default where this package has its classes.
        imports: modules that register strings.
        trainer: options of every Trainer. A function stands for what it returns for the package of Lightning.
        task: ``"module:function"`` that makes the LightningModule.
        task_options: what it is called with, beside the package of Lightning.
        steps: optimizer steps of a run, in two epochs; an even number.
        cuts: optimizer steps after which a run is cut, two or more; by default after the first step, within the first
            epoch, at its end, and before the last step.
        state: keys that the method keeps in a checkpoint; by default the row's.
        no_state: what of the row's is not there with these options.
        wrong: argument -> a value that a ConfigurationError has to name.
        refusals: key of the row's conflicts -> how it is provoked.
        named: what a refusal may call the method, beside its name and its class.
        unlogged: documented metric -> why a run with ``options`` does not log it.
        no_way_back: why the method does not go on from what plain Lightning makes of its checkpoint; empty if it does.
        card: file of the method card; by default the one in this package.
    """

    info: MethodInfo
    options: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] | None = field(default_factory=dict)
    no_neutral: str = ""
    plain: Mapping[str, Any] | None = None
    changes: bool = True
    variant: str = ""
    classes: Mapping[str, str] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)
    task: str = "lightning_eff.testing.tasks:task"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    cuts: Sequence[int] = ()
    state: tuple[str, ...] | None = None
    no_state: tuple[str, ...] = ()
    wrong: Mapping[str, Any] = field(default_factory=dict)
    refusals: Mapping[str, Provocation] = field(default_factory=dict)
    named: tuple[str, ...] = ()
    unlogged: Mapping[str, str] = field(default_factory=dict)
    no_way_back: str = ""
    card: Path | None = None

    kind: ClassVar[str] = ""
    module: ClassVar[str] = ""
    own_process: ClassVar[bool] = False

    @property
    def world(self) -> int:
        """Processes that the method is at work on."""
        return 1

    @property
    def id(self) -> str:
        """Name of the case in a test's name."""
        return f"{self.info.name}:{self.variant}" if self.variant else self.info.name

    @property
    def paths(self) -> Mapping[str, str]:
        """Package of Lightning -> ``"module:Class"``, those only that are installed."""
        name = self.info.class_name
        ours = {
            "lightning.pytorch": f"lightning_eff.{self.module}:{name}",
            "pytorch_lightning": f"lightning_eff.pytorch_lightning:{name}",
        }
        given = self.classes or ours
        return {root: path for root, path in given.items() if importlib.util.find_spec(root.partition(".")[0])}

    @property
    def root(self) -> str:
        """The first package of Lightning."""
        return next(iter(self.paths))

    @property
    def cut_after(self) -> tuple[int, ...]:
        """Optimizer steps after which a run is cut."""
        return tuple(self.cuts) or (1, self.steps // 3, self.steps // 2, self.steps - 1)

    @property
    def state_keys(self) -> set[str]:
        """Keys that are expected in a checkpoint of the method at work."""
        keys = self.info.state_keys if self.state is None else self.state
        return set(keys) - set(self.no_state)

    @property
    def card_path(self) -> Path:
        """Where the method card should be."""
        return self.card or Path(str(files("lightning_eff"))) / "cards" / f"{self.info.name}.md"

    def plain_plan(self, root: str = "", **changes: Any) -> Plan:
        """Return a run of plain Lightning.

        Args:
            root: package of Lightning; the first by default.
            changes: of the plan's fields.
        """
        fields: dict[str, Any] = {
            "root": root or self.root,
            "kind": self.kind,
            "trainer": self.trainer,
            "task": self.task,
            "task_options": self.task_options,
            "steps": self.steps,
            "world": self.world,
            "own_process": self.own_process,
            "imports": self.imports,
        }
        return Plan(**{**fields, **changes})

    def plan(self, root: str = "", options: Mapping[str, Any] | None = None, **changes: Any) -> Plan:
        """Return a run with the method.

        Args:
            root: package of Lightning; the first by default.
            options: in place of the case's.
            changes: of the plan's fields.
        """
        path = self.paths[root or self.root]
        return self.plain_plan(
            root, **{"path": path, "options": self.at_work if options is None else options, **changes}
        )

    @property
    def at_work(self) -> Mapping[str, Any]:
        """Every argument of the method at work."""
        return self.options

    def state_of(self, checkpoint: Mapping[str, Any]) -> Any:
        """Return what the method keeps in a checkpoint, or None."""
        return checkpoint.get(self.info.class_name)


@dataclass(frozen=True, kw_only=True)
class StrategyCase(Case):
    """A strategy for :class:`~lightning_eff.testing.strategies.StrategyBattery`.

    Attributes:
        strings: what ``Trainer(strategy=...)`` knows it by; by default the row's name.
        always: arguments of every object (``{"process_group_backend": "gloo"}``).
        num_ranks: processes that the method is at work on.
        neutral_ranks: processes of the neutral run; by default as many.
        same_data: ranks see the same micro-batches: there is one replica.
        emulated: one process with the same options computes the same weights.
    """

    strings: tuple[str, ...] | None = None
    always: Mapping[str, Any] = field(default_factory=lambda: {"process_group_backend": "gloo"})
    num_ranks: int = 2
    neutral_ranks: int | None = None
    same_data: bool = False
    emulated: bool = False

    kind: ClassVar[str] = "strategy"
    module: ClassVar[str] = "strategies"
    own_process: ClassVar[bool] = True

    @property
    def world(self) -> int:
        """Processes that the method is at work on."""
        return self.num_ranks

    @property
    def at_work(self) -> Mapping[str, Any]:
        """See :class:`Case`."""
        return {**self.always, **self.options}

    @property
    def known_as(self) -> tuple[str, ...]:
        """Strings of the strategy."""
        return (self.info.name,) if self.strings is None else self.strings

    def plain_plan(self, root: str = "", **changes: Any) -> Plan:
        """See :class:`Case`."""
        return Case.plain_plan(self, root, **{"same_data": self.same_data, **changes})

    def plan(self, root: str = "", options: Mapping[str, Any] | None = None, **changes: Any) -> Plan:
        """See :class:`Case`."""
        return Case.plan(self, root, None if options is None else {**self.always, **options}, **changes)


@dataclass(frozen=True, kw_only=True)
class CallbackCase(Case):
    """A callback for :class:`~lightning_eff.testing.callbacks.CallbackBattery`.

    Attributes:
        alone: why it is not tried on two ranks; empty if it is.
    """

    alone: str = ""

    kind: ClassVar[str] = "callback"
    module: ClassVar[str] = "callbacks"

    def state_of(self, checkpoint: Mapping[str, Any]) -> Any:
        """See :class:`Case`."""
        return checkpoint.get("callbacks", {}).get(self.info.class_name)


@dataclass(frozen=True, kw_only=True)
class PrecisionCase(Case):
    """A precision plugin for :class:`~lightning_eff.testing.precision.PrecisionBattery`.

    Attributes:
        alone: why it is not tried on two ranks; empty if it is.
        remembering: options with which a run remembers something that the next steps need; None if it never does.
        saved_bits: bits that a converted layer keeps of each of its inputs.
    """

    neutral: Mapping[str, Any] | None = None
    no_neutral: str = "it rounds in every setting"
    alone: str = ""
    remembering: Mapping[str, Any] | None = None
    saved_bits: int = 8

    kind: ClassVar[str] = "precision"
    module: ClassVar[str] = "precision"

    @property
    def at_work(self) -> Mapping[str, Any]:
        """See :class:`Case`; what the method's string means is part of it."""
        return {**self.info.options, **self.options}

    def plain_plan(self, root: str = "", **changes: Any) -> Plan:
        """See :class:`Case`; two ranks accumulate, so that a step has gradients of several micro-batches."""
        two = {"trainer": {**self.trainer, "accumulate_grad_batches": 2}} if changes.get("world") == 2 else {}
        return Case.plain_plan(self, root, **{**two, **changes})

    def plan(self, root: str = "", options: Mapping[str, Any] | None = None, **changes: Any) -> Plan:
        """See :class:`Case`."""
        return Case.plan(self, root, None if options is None else {**self.info.options, **options}, **changes)

    def string_plan(self, root: str = "", base: str = "", **changes: Any) -> Plan:
        """Return a run with the method's string, on the Lightning precision ``base`` or the method's own."""
        string = f"{self.info.name}+{base}" if base else self.info.name
        return self.plain_plan(root, string=string, **changes)


def collect_cases(folder: str | Path, package: str, kind: type[Case]) -> tuple[Any, ...]:
    """Return the cases of one kind from every module ``cases_*.py`` below a folder.

    A module has them in ``CASES``.

    Args:
        folder: of the package.
        package: its name; every folder below is a package as well.
        kind: of the cases.
    """
    found: list[Case] = []
    for file in sorted(Path(folder).rglob("cases_*.py")):
        inner = file.relative_to(folder).with_suffix("").parts
        module = importlib.import_module(".".join((package, *inner)))
        found += module.CASES
    return tuple(case for case in found if isinstance(case, kind))
