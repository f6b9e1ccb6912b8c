"""What passes from one layer to the next: tensors, and what has to stay as it is."""

from __future__ import annotations

import pytest
import torch

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.strategies.pipelined_bp.carry import Carry, Form


def test_a_form_knows_tensors_from_the_rest() -> None:
    x, mask = torch.ones(2), torch.zeros(2, dtype=torch.bool)
    form = Form.of(Carry((x, {"mask": mask, "scale": 2}), (None,), {"causal": True}))
    other = Carry((torch.ones(5), {"mask": mask, "scale": 2}), (None,), {"causal": True})
    assert form.tensors(other) == [other.x[0], mask]  # another shape is fine
    assert form.carry([x, mask]).x == (x, {"mask": mask, "scale": 2})
    for changed in (
        other._replace(kwargs={"causal": False}),
        other._replace(args=()),
        other._replace(x=(x, {"mask": None, "scale": 2})),
        other._replace(x=x),
    ):
        with pytest.raises(UnsupportedCombinationError, match="has changed since the first batch"):
            form.tensors(changed)
