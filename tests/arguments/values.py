"""What is given to every option: valid, nearly valid and wild values, and what YAML can say."""

from __future__ import annotations

import enum
import itertools
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn


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
