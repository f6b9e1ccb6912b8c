"""Two seeds: one that never changes and one that changes every day, so that no seed can hide a flaky test."""

from __future__ import annotations

import datetime as dt
import os
import random

import torch

FIXED_SEED = 20240419


def seed_of_the_day() -> int:
    """The date as YYYYMMDD, or ``EFF_SEED`` to replay the run of another day."""
    given = os.environ.get("EFF_SEED")
    return int(given) if given else int(dt.datetime.now(dt.timezone.utc).strftime("%Y%m%d"))


def seed_everything(seed: int) -> None:
    """Seed the generators a test may draw from, without leaving Lightning's environment variables behind."""
    random.seed(seed)
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed keeps a stack for every kind of device that is not there, and forgets none
        torch.default_generator.manual_seed(seed)
    try:
        import numpy as np
    except ImportError:
        return
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the legacy generator is the one third parties draw from
