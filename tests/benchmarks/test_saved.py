"""The counter of saved bytes, against sizes known beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.tasks.saved import quantisable, record_saved

FLOAT_BYTES = 4


def test_inputs_are_counted_and_parameters_are_not() -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with record_saved([layers[0], layers[2]]) as saved:
        layers(torch.randn(32, 8)).sum().backward()
    assert saved.activation_bytes == 32 * (8 + 16) * FLOAT_BYTES
    assert saved.weight_bytes == 0


def test_a_tensor_saved_twice_counts_once() -> None:
    left, right = nn.Linear(8, 8), nn.Linear(8, 8)
    x = torch.randn(32, 8)
    with record_saved([left, right]) as saved:
        (left(x) + right(x)).sum().backward()
    assert saved.activation_bytes == 32 * 8 * FLOAT_BYTES


@pytest.mark.parametrize("rows", [8, 16])  # 16 rows: the input has the weight's shape
def test_casts_of_weights_are_told_apart(rows: int) -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16))
    with torch.autocast("cpu", torch.bfloat16), record_saved(layers) as saved:
        layers(torch.randn(rows, 8, requires_grad=True)).sum().backward()
    assert saved.activation_bytes == rows * (8 + 8) * FLOAT_BYTES // 2
    assert saved.weight_bytes == (8 * 8 + 8 * 16) * FLOAT_BYTES // 2


def test_layers_are_left_as_they_were() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError), record_saved([layer]):
        layer(torch.randn(3, 5))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert layer(torch.randn(3, 4)).grad_fn is not None


def test_quantisable_leaves_first_and_last_out() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2))
    assert quantisable(model) == ["1", "3"]
    assert quantisable(model, exempt_first_last=False) == ["0", "1", "3", "4"]
