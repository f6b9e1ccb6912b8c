"""What every test may lean on: seeds, the leak police and real process groups."""

from tests.harness.leaks import Snapshot, keep_globals
from tests.harness.ranks import RanksFailedError, run_ranks
from tests.harness.seeds import FIXED_SEED, seed_everything, seed_of_the_day

__all__ = [
    "FIXED_SEED",
    "RanksFailedError",
    "Snapshot",
    "keep_globals",
    "run_ranks",
    "seed_everything",
    "seed_of_the_day",
]
