"""A loader that a run can be taken up in the middle of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class ResumableLoader:
    """Gives batches from the one on that a checkpoint says is next.

    Args:
        batches: of an epoch.
        shuffled: give them in another order in every epoch.
    """

    def __init__(self, batches: Iterable[Any], *, shuffled: bool = False) -> None:
        self.batches, self.shuffled = list(batches), shuffled
        self.next = 0
        """Batches given, in all epochs together."""

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        epoch, begin = divmod(self.next, len(self))
        order = range(len(self))
        if self.shuffled:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(epoch)).tolist()
        for place in order[begin:]:
            self.next += 1
            yield self.batches[place]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.next = state_dict["next"]
