"""Layers that read one tensor keep one copy of its codes; a tensor that was written to is encoded again."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.precision.formats.base import LayerOptions
from lightning_eff.precision.formats.fp8 import FP8Options
from lightning_eff.precision.formats.history import advance
from lightning_eff.precision.formats.luq import LUQOptions
from lightning_eff.precision.formats.shared_exponent import FlexpointOptions
from lightning_eff.precision.layers.convert import Conversion, convert
from lightning_eff.precision.layers.state import RecentInputs

CONFIG = LUQOptions(exempt_first_last=False)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) * self.v(x)


def converted(model: nn.Module) -> Conversion:
    return convert(model, CONFIG)


def test_three_projections_keep_one_copy() -> None:
    model = Branches()
    conversion = converted(model)
    kept = []
    x = torch.randn(6, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    packed = {t.untyped_storage().data_ptr() for t in kept if t.dtype == torch.uint8}
    assert len(packed) == 1
    assert conversion.saved_bytes() == (6 * 16 // 2 + 8, 6 * 16 * 4)


def test_sharing_changes_no_number(monkeypatch) -> None:
    results = []
    for capacity in (3, 0):
        monkeypatch.setattr(RecentInputs, "CAPACITY", capacity)
        monkeypatch.setattr(RecentInputs, "find", RecentInputs.find if capacity else lambda *_: None)
        torch.manual_seed(0)
        model = Branches()
        converted(model)
        x = torch.randn(6, 16, requires_grad=True)
        out = model(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_written_tensor_is_encoded_again() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    layer[1].load_state_dict(layer[0].state_dict())
    converted(layer)
    x = torch.randn(6, 16, requires_grad=True).clone()
    first = layer[0](x)
    x.mul_(-1)
    assert not torch.equal(layer[1](x), first), "an in-place write moves the version"
    with torch.no_grad():
        y = torch.randn(6, 16)
    before = layer[0](y)
    y.data.neg_()
    assert not torch.equal(layer[1](y), before), "a write through .data moves the fingerprint"


def test_linear_and_convolution_do_not_mix_layouts() -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 1)
    with torch.no_grad():
        conv.weight.copy_(linear.weight[:, :, None])
        conv.bias.copy_(linear.bias)
    model = nn.ModuleList([linear, conv])
    converted(model)
    x = torch.randn(2, 8, 8, requires_grad=True)
    torch.testing.assert_close(model[1](x), model[0](x.transpose(1, 2)).transpose(1, 2))
    assert not torch.allclose(model[1](x), model[0](x))


def test_inputs_are_not_kept_alive() -> None:
    model = Branches()
    converted(model)
    x = torch.randn(6, 16, requires_grad=True)
    alive = weakref.ref(x)
    model(x).sum().backward()
    del x
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    "options",
    [
        FP8Options(scaling="delayed", exempt_first_last=False, filter_slow=False),
        FlexpointOptions(),
    ],
    ids=["fp8-delayed", "flexpoint16"],
)
def test_one_tensor_has_one_prediction(options: LayerOptions) -> None:
    """Layers that read one input share the history its scale comes from, so that each can encode it alone as well."""
    torch.manual_seed(0)
    model = Branches()
    states = convert(model, options).states
    histories = [history for state in states.values() for history in state.histories.values()]
    for factor in (1.0, 2.0, 4.0):
        model(torch.randn(6, 16) * factor).sum().backward()
        histories = [history for state in states.values() for history in state.histories.values()]
        advance(histories, torch.device("cpu"))
    first, *others = (state.histories["input"] for state in states.values())
    assert all(history is first for history in others)
    assert len(first.estimate.state_dict()["history"]) == 3, "observed once a step, however many layers read it"
    x = torch.randn(6, 16) * 4
    alone = [state.encode_input(x, lambda t: t, save=False)[0].scale.item() for state in states.values()]
    assert len(set(alone)) == 1
