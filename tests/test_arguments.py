"""Every public class, given anything: it is made and can be used, or says why not in an error of ours.

What an option may be is tried one by one from a pool of valid, nearly valid and wild values, then several at once,
about 300 calls a class, in Python and through jsonargparse's YAML.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import inspect
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

from lightning_eff import LowPrecision
from lightning_eff.checks import Choice, Either, Maybe, Names, Real, Whole, YesNo, check, shown
from lightning_eff.errors import ConfigurationError, EffError
from lightning_eff.functional.numerics.dfp16 import dfp_codes
from lightning_eff.functional.numerics.flexpoint import Autoflex, autoflex_init, flex_codes
from lightning_eff.functional.numerics.float_format import FloatFormat
from lightning_eff.functional.numerics.fp8 import DelayedScale
from lightning_eff.functional.numerics.lognormal import FittedFormat, best_format, threshold_for
from lightning_eff.functional.numerics.luq import HindsightMax, luq_scale, smp_quantize
from lightning_eff.functional.numerics.sawb import sawb_codes
from lightning_eff.functional.partition import balance
from lightning_eff.functional.staleness.mitigation import spike_coefficients
from lightning_eff.functional.staleness.schedule import stage_delay, utilisation
from lightning_eff.functional.staleness.stability import max_stable_lr
from lightning_eff.functional.stragglers.model import best_threshold, ideal_threshold, predicted
from lightning_eff.functional.stragglers.simulated import LognormalDelay, SlowRankDelay, StallDelay, parse_delay
from lightning_eff.functional.stragglers.threshold import extra_steps, gradient_factor
from lightning_eff.methods import METHODS
from lightning_eff.optim import bf16_updates
from lightning_eff.plan.dropcompute import plan_row
from lightning_eff.plan.timings import DelaySource
from lightning_eff.precision.layers.convert import convert
from lightning_eff.strategies.pipelined_bp.mitigation import parse_mitigation
from tests.harness import run_ranks

CALLS = 300


class Hostile:
    """Raises whatever is asked of it."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    def __bool__(self) -> bool:
        raise RuntimeError("taken for true or false")

    def __repr__(self) -> str:
        raise RuntimeError("written")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"asked for {name}")

    __hash__ = None  # type: ignore[assignment]
    __lt__ = __le__ = __gt__ = __ge__ = __eq__  # type: ignore[assignment]
    __len__ = __iter__ = __index__ = __float__ = __bool__  # type: ignore[assignment]


class Pretends:
    """Says it is an int."""

    __class__ = int  # type: ignore[assignment]


class Words(str, enum.Enum):
    AUTO = "auto"
    OTHER = "other"


class Numbers(enum.IntEnum):
    TWO = 2


WILD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 64, 65, 10**5, 2**31, 2**53 + 1, 2**63, 2**70, -(2**70), 10**20, 10**400,
    -(10**400), 0.0, -0.0, 0.5, 0.999, 1.0, 1.5, 7.0, -0.1, 5e-324, 1e-300, 1e20, 1e308, math.inf, -math.inf,
    math.nan, 1j, "", " ", "auto", "AUTO", "auto ", "1", "0.5", "nan", "inf", "None", "\0", "\ud800", "ü" * 3, "٣",
    "x" * 10**5, "a" * 300, "lognormal", "stall:p=2", "stall:factor=1e308", "slow:rank=-1", "no/such/file.csv", "/",
    "layers", "*.head", "lwp+sc", b"auto", bytearray(b"1"), [], [1], ["*"], ["a", 1], [None], [[]], (), ("*", "0"),
    {"*"}, frozenset(), {}, {"a": 1}, {1: 2}, range(10**9), itertools.count(), (n for n in ()), slice(1), lambda: 1,
    int, object(), Hostile(), Pretends(), [Hostile()], Words.AUTO, Words.OTHER, Numbers.TWO, Fraction(1, 2),
    Decimal("0.5"), Decimal("nan"), np.int64(3), np.uint8(200), np.float32(0.5), np.float64("nan"), np.bool_(True),
    np.str_("auto"), np.datetime64("2020-01-01"), np.array(3), np.array([1, 2]), np.zeros((100, 100)),
    np.array(["*"]), np.array([object()]), np.array([]), torch.tensor(2), torch.tensor(0.5), torch.ones(2),
    torch.zeros(3, device="meta"), torch.tensor(True), torch.empty(0), nn.Linear(1, 1), torch.device("cpu"),
    torch.float32, NotImplemented, ..., type(None),
]  # fmt: skip
YAML: list[Any] = [
    None, True, False, 0, 1, 2, 7, 64, -1, 2**40, 2**70, 0.5, -0.5, 1.0, 1e300, "", "auto", "yes", "luq", "nearest",
    "1", "x" * 500, [], ["*"], [1], [None], {}, {"a": 1}, [["*"]], "raise", "mirror5", "lwp", "ü",
]  # fmt: skip


def public(kind: str) -> Iterator[type[Any]]:
    module = importlib.import_module(f"lightning_eff.{kind}")
    yield from (getattr(module, name) for name in module.__all__)


LIGHTNING = [cls for kind in ("precision", "strategies", "callbacks") for cls in public(kind)]
ESTIMATES = [Autoflex, DelayedScale, HindsightMax, FittedFormat, FloatFormat]
DELAYS = [LognormalDelay, StallDelay, SlowRankDelay]
every_class = pytest.mark.parametrize("cls", [*LIGHTNING, *ESTIMATES, *DELAYS], ids=lambda cls: cls.__name__)
every_lightning_class = pytest.mark.parametrize("cls", LIGHTNING, ids=lambda cls: cls.__name__)

REQUIRED: dict[str, dict[str, Any]] = {
    "LUQFineTuning": {"steps": 5},
    "FittedFormat": {"bits": 8},
    "FloatFormat": {"exponent_bits": 4, "mantissa_bits": 3},
}


def options_of(cls: type[Any]) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in ("self", "args", "kwargs")]


def literals(annotation: Any) -> list[Any]:
    """The values an annotation names."""
    found: list[Any] = []
    for part in get_args(annotation):
        found += literals(part) if get_args(part) else [part] if isinstance(part, str | int | bool) else []
    return found


def pool(cls: type[Any], name: str, wild: list[Any]) -> list[Any]:
    owner = cls.__init__
    hints = get_type_hints(owner)
    default = inspect.signature(cls).parameters[name].default
    return [default, *literals(hints.get(name)), *wild] if default is not inspect.Parameter.empty else wild


def made(cls: type[Any], options: dict[str, Any]) -> tuple[Any, str]:
    """The object, or the message of an error of ours; any other error fails the test."""
    try:
        return cls(**{**REQUIRED.get(cls.__name__, {}), **options}), ""
    except EffError as error:
        return None, str(error)


def plain(value: Any) -> bool:
    """Whether a kept option is a plain value, so that what is done with it later cannot surprise."""
    if isinstance(value, tuple | list):
        return all(plain(part) for part in value)
    return value is None or type(value) in {bool, int, float, str}


def used(thing: Any) -> None:
    """What a run does first with an object that was made."""
    if dataclasses.is_dataclass(given := getattr(thing, "options", None)):
        given.format().histories()
        assert all(plain(getattr(given, field.name)) for field in dataclasses.fields(given))
    else:
        kept = {name: value for name, value in vars(thing).items() if name in options_of(type(thing))}
        assert all(plain(value) or name in {"delay", "options", "mitigation"} for name, value in kept.items())
    if type(thing).__name__ not in {"DropComputeStrategy", "PipelinedBPStrategy"} and hasattr(thing, "state_dict"):
        thing.state_dict()
    if isinstance(thing, tuple(DELAYS)):
        assert math.isfinite(thing.extra_s(3, 0, 1, 0.1))
    if hasattr(thing, "update") and callable(thing.update):
        thing.update(*([1.0] * (2 if isinstance(thing, FittedFormat) else 1)))


@every_class
def test_each_option_takes_anything_or_says_why_not(cls: type[Any]) -> None:
    taken = 0
    for name in options_of(cls):
        for value in pool(cls, name, WILD):
            thing, told = made(cls, {name: value})
            if thing is None:
                assert len(told) < 700, "a message for people"
                assert name in told or "method" in told or name in {"delay", "options"}, told
            else:
                taken += 1
                used(thing)
    assert taken >= len(options_of(cls)), "each takes something"


@every_class
def test_several_options_at_once(cls: type[Any], seed: int) -> None:
    draw = random.Random(f"{cls.__name__} {seed}")
    names = options_of(cls)
    pools = {name: pool(cls, name, WILD) for name in names}
    for _ in range(CALLS):
        chosen = draw.sample(names, k=draw.randint(1, min(4, len(names))))
        thing, _ = made(cls, {name: draw.choice(pools[name]) for name in chosen})
        if thing is not None:
            used(thing)


def accepted(cls: type[Any], number: int) -> list[dict[str, Any]]:
    """Options, of one to three kinds, that a class takes."""
    draw = random.Random(cls.__name__)
    names = options_of(cls)
    values = {name: [v for v in pool(cls, name, WILD) if made(cls, {name: v})[0] is not None] for name in names}
    found: list[dict[str, Any]] = []
    while len(found) < number:
        options = {name: draw.choice(values[name]) for name in draw.sample(names, k=min(3, len(names)))}
        if made(cls, options)[0] is not None:
            found.append(options)
    return found


CONVERTING = [cls for cls in public("precision") if hasattr(cls, "options_class")]


@pytest.mark.parametrize("cls", CONVERTING, ids=lambda c: c.__name__)
def test_what_a_precision_has_taken_trains(cls: type[Any]) -> None:
    for options in accepted(cls, 12):
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        taken = made(cls, options)[0].options
        try:
            convert(model, taken)
        except EffError:  # a pattern that matches no layer
            continue
        for _ in range(2):
            model(torch.randn(6, 5)).square().mean().backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def _train(rank: int, world: int, kind: str, name: str) -> int:
    """How many of 15 objects trained two steps; the others said why not before the first."""
    from tests.state.runs import quiet_trainer, task

    cls = getattr(importlib.import_module(f"lightning_eff.{kind}"), name)
    fixed = {"process_group_backend": "gloo"} if kind == "strategies" else {}
    trained = 0
    for options in accepted(cls, 15):
        thing, _ = made(cls, {**options, **fixed})
        given = {"strategy": thing} if kind == "strategies" else {"callbacks": [thing]}
        if name == "LUQFineTuning":
            given["precision"] = "luq4"
        with contextlib.suppress(EffError):
            quiet_trainer(max_steps=2, accumulate_grad_batches=1, **given).fit(task("sgd"))
            trained += 1
    return trained


@pytest.mark.long
@pytest.mark.parametrize(("kind", "cls"), [(k, c) for k in ("strategies", "callbacks") for c in public(k)], ids=str)
def test_what_else_has_been_taken_trains(kind: str, cls: type[Any]) -> None:
    assert run_ranks(_train, 1, kind, cls.__name__, init_group=False)[0] > 0


def test_the_options_of_a_method_by_callback() -> None:
    """Names and values of ``LowPrecision(options=...)`` are looked at when it is made."""
    for info in METHODS.values():
        if info.kind != "precision":
            continue
        for name in options_of(info.load_mixin()):
            for value in WILD:
                thing, told = made(LowPrecision, {"method": info.name, "options": {name: value}})
                assert thing is not None or name in told
    for name in (*WILD, "levles"):
        if type(name).__hash__ is not None and not isinstance(name, slice | torch.Tensor):
            thing, told = made(LowPrecision, {"options": {name: 1}})
            assert thing is None
            assert told
    assert "Did you mean 'levels'?" in made(LowPrecision, {"options": {"levles": 8}})[1]


CALLABLE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "smp_quantize": (smp_quantize, {"x": torch.ones(3), "samples": 2, "levels": 7}),
    "luq_scale": (luq_scale, {"max_abs": torch.tensor(1.0), "levels": 7}),
    "flex_codes": (flex_codes, {"x": torch.ones(3), "scale": 1.0, "bits": 16, "rounding": "nearest"}),
    "dfp_codes": (dfp_codes, {"x": torch.ones(3), "bits": 16}),
    "sawb_codes": (sawb_codes, {"x": torch.ones(3), "bits": 4, "unsigned": False}),
    "autoflex_init": (autoflex_init, {"max_abs": 1.0, "bits": 16}),
    "best_format": (best_format, {"bits": 8, "sigma2": 3.0}),
    "threshold_for": (threshold_for, {"sparsity": 0.5, "sigma": 1.0}),
    "stage_delay": (stage_delay, {"stage": 0, "stages": 3, "in_flight": 2}),
    "utilisation": (utilisation, {"samples": 5, "stages": 3}),
    "spike_coefficients": (spike_coefficients, {"momentum": 0.9, "delay": 2}),
    "max_stable_lr": (max_stable_lr, {"curvature": 1.0, "delay": 2, "momentum": 0.5, "mitigation": "none"}),
    "balance": (balance, {"costs": [1.0, 2.0], "parts": 2}),
    "predicted": (predicted, {"table": torch.ones(2, 2, 2), "other": 0.0, "tau": 1.0, "min_micro_batches": 1}),
    "best_threshold": (best_threshold, {"table": torch.ones(2, 2, 2), "max_drop_rate": 0.1, "min_gain": 0.0}),
    "ideal_threshold": (ideal_threshold, {"table": torch.ones(2, 2, 2), "other": 0.0, "candidates": 5}),
    "extra_steps": (extra_steps, {"steps": 10, "drop_rate": 0.1}),
    "gradient_factor": (gradient_factor, {"counts": torch.ones(2), "micro_batches": 3, "normalize": "computed"}),
    "parse_delay": (parse_delay, {"spec": "stall"}),
    "parse_mitigation": (parse_mitigation, {"text": "lwp", "horizon": None, "gamma": 0.5, "stash": False}),
    "bf16_updates": (lambda update: bf16_updates(sgd(), update=update), {"update": "split"}),
    "plan_row": (
        lambda **options: plan_row(DelaySource(StallDelay(), 4), **options),
        {"workers": 2, "steps": 3, "window_steps": 3, "repetitions": 1, "min_micro_batches": 1, "max_drop_rate": 1.0},
    ),
}
"""Functions whose time, memory or branches depend on a number or a word: the options that are tried, and good ones."""
TENSORS = {"x", "max_abs", "scale", "table", "other", "counts", "costs", "stash", "steps"}
SMALL = [v for v in WILD if type(v) is not int or v <= 100]


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], lr=0.1)


@pytest.mark.parametrize("name", CALLABLE)
def test_functions_take_their_numbers_and_words_or_say_why_not(name: str) -> None:
    function, good = CALLABLE[name]
    function(**good)
    for option in set(good) - TENSORS:
        for value in SMALL if name == "plan_row" else WILD:
            with contextlib.suppress(EffError):
                function(**{**good, option: value})


# --------------------------------------------------------------------------------------------------------------- YAML


def parser(cls: type[Any]) -> Any:
    from jsonargparse import ArgumentParser

    base = next(base for base in cls.__mro__ if base.__module__.startswith("lightning.pytorch"))
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--thing", type=base)
    return made


def through_yaml(cls: type[Any], options: dict[str, Any]) -> Any:
    """The object jsonargparse makes, or None where it or the class says why not."""
    from jsonargparse import ArgumentError

    reader = parser(cls)
    given = {**REQUIRED.get(cls.__name__, {}), **options}
    text = json.dumps({"thing": {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": given}})
    try:
        return reader.instantiate_classes(reader.parse_string(text)).thing
    except (ArgumentError, EffError):
        return None


def _yaml(cls: type[Any], calls: int) -> None:
    draw = random.Random(cls.__name__)
    names = options_of(cls)
    assert type(through_yaml(cls, {})).__name__ == cls.__name__
    for _ in range(calls):
        chosen = draw.sample(names, k=draw.randint(1, min(3, len(names))))
        thing = through_yaml(
            cls, {name: draw.choice([*literals(get_type_hints(cls.__init__).get(name)), *YAML]) for name in chosen}
        )
        if thing is not None:
            used(thing)


@every_lightning_class
def test_through_yaml(cls: type[Any]) -> None:
    _yaml(cls, 40)


@pytest.mark.long
@every_lightning_class
def test_much_through_yaml(cls: type[Any]) -> None:
    _yaml(cls, CALLS)


REFUSED = {"BF16Precision": {"update": "splt"}, "LowPrecision": {"options": {"levels": 99}}}
"""Options of LightningCLI that are refused; of other classes the timeout or the steps between two things."""


@pytest.mark.parametrize("good", [True, False])
@every_lightning_class
def test_through_lightnings_command_line(
    cls: type[Any], good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    monkeypatch.setattr("sys.argv", ["app.py"])
    steps = [name for name in options_of(cls) if name.endswith(("_steps", "timeout_s"))][-1:]
    wrong = REFUSED.get(cls.__name__) or dict.fromkeys(steps, -5) or {"steps": -5}
    options = {**REQUIRED.get(cls.__name__, {}), **({} if good else wrong)}
    thing = {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": options}
    kind = next(kind for kind in ("precision", "strategies", "callbacks") if cls in set(public(kind)))
    given = {"strategy": thing} if kind == "strategies" else {"plugins" if kind == "precision" else kind: [thing]}
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    (tmp_path / "config.yaml").write_text(json.dumps({"trainer": {**quiet, **given}}))
    told = contextlib.nullcontext() if good else pytest.raises((SystemExit, ValueError))  # jsonargparse wraps ours
    with told as caught:
        app = LightningCLI(BoringModel, run=False, args=["--config", str(tmp_path / "config.yaml")])
        assert cls.__name__ in app.parser.dump(app.config)
    if not good:
        name = "levels" if cls.__name__ == "LowPrecision" else next(iter(wrong))
        assert name in str(caught.value) + capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("rule", "given", "told"),
    [
        (Whole(2, 8), "7", "x='7' is not allowed; it must be a whole number from 2 to 8."),
        (Whole(1, 64, "why"), 65, "x=65 is not allowed; it must be a whole number from 1 to 64 (why)."),
        (Whole(1), True, "x=True is not allowed; it must be a whole number, 1 or more (2**53 at most)."),
        (Real(0, 1, below=True), 1, "x=1 is not allowed; it must be a finite number, 0 or more, below 1."),
        (Real(0, math.inf), math.nan, "x=nan is not allowed; it must be a number, 0 or more, inf at most."),
        (Choice("auto", "native"), "natve", "it must be one of 'auto', 'native'. Did you mean"),
        (YesNo(), 1, "x=1 is not allowed; it must be True or False."),
        (Maybe(Whole(1)), 0, "it must be a whole number, 1 or more (2**53 at most), or None."),
        (Either(Choice("auto"), Real(0)), [], "x=[] is not allowed; it must be one of 'auto', or a finite"),
        (Names(), "head", "x='head' is not allowed; it must be a list of name patterns, ['*.head']."),
        (Whole(1), np.ones((3, 2)), "x=<ndarray of shape (3, 2) and dtype float64> is not allowed"),
        (Whole(1), Hostile(), "x=<Hostile> is not allowed"),
        (Whole(1), 10**5000, "x=<an integer of 16610 bits> is not allowed"),
    ],
    ids=shown,
)  # fmt: skip
def test_what_is_refused_is_said_in_one_way(rule: Any, given: Any, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check("x", given, rule)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("rule", "given", "read"),
    [
        (Whole(2, 8), np.int64(7), 7),
        (Whole(2, 8), Numbers.TWO, 2),
        (Real(0, 1), np.float32(0.5), 0.5),
        (Real(0, 1), 1, 1.0),
        (Real(0, 1), Fraction(1, 2), 0.5),
        (YesNo(), np.bool_(False), False),
        (Choice("auto", "other"), Words.AUTO, "auto"),
        (Choice("auto"), np.str_("auto"), "auto"),
        (Choice(8, 6), np.int32(6), 6),
        (Names(), ["b", "a"], ("b", "a")),
        (Names(), {"b", "a"}, ("a", "b")),
    ],
    ids=shown,
)
def test_what_is_allowed_is_read_as_a_plain_value(rule: Any, given: Any, read: Any) -> None:
    found = check("x", given, rule)
    assert found == read
    assert type(found) is type(read)


def test_whatever_is_given_can_be_shown_in_a_line() -> None:
    for value in [*WILD, {"a": Hostile()}, [[[[[1]]]]], {i: i for i in range(10**4)}, torch.ones(1000, 1000)]:
        text = shown(value)
        assert len(text) < 500
        assert "\n" not in text
