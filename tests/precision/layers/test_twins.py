"""A converted layer is a substitute: with a format that keeps every bit it is the plain layer, however it is called.

Every supported module, times the ways torch lets a module be called: value, strides, dtype, device, whether gradients
are recorded, gradients with their strides, or the type of the error are those of the plain layer.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

from tests.precision.exact import exactly_converted


class Initialised(nn.Linear):
    """A subclass that changes the initialisation alone."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.5)
        nn.init.ones_(self.bias)


class Tagged(Tensor):
    """A subclass of Tensor that goes through every function unharmed."""


class SelfAttention(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(12, 12), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.body(x) + x  # type: ignore[no-any-return]


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 7), (6, 12)),
    "linear 3-d": (lambda: nn.Linear(12, 7), (4, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 7, bias=False), (2, 3, 4, 12)),
    "subclass": (lambda: Initialised(12, 7), (6, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (3, 4, 7, 6)),
    "conv2d from one": (lambda: nn.Conv2d(1, 6, 3), (3, 1, 7, 6)),
    "conv2d pointwise": (lambda: nn.Conv2d(4, 6, 1), (3, 4, 7, 6)),
    "conv2d one image": (lambda: nn.Conv2d(4, 1, 3, stride=2), (1, 4, 7, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (3, 4, 7, 6)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (3, 4), padding="same", dilation=2), (3, 4, 9, 8)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 7, 6)),
    "conv2d channels-last weight": (
        lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        (3, 4, 7, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 3)),
    "attention": (lambda: SelfAttention(batch_first=True), (3, 5, 12)),
    "attention, sequence first": (lambda: SelfAttention(batch_first=False), (5, 3, 12)),
    "relu": (lambda: nn.Sequential(nn.Linear(12, 12), nn.ReLU()), (6, 12)),
    "relu in place": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True)), (3, 4, 7, 6)),
    "relu before a skip": (Block, (6, 12)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True), 2),
        (3, 5, 12),
    ),
}


Call = Callable[[nn.Module, Tensor], Tensor]


def _autocast(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m(x)  # type: ignore[no-any-return]


def _traced(m: nn.Module, x: Tensor) -> Tensor:
    return torch.jit.trace(m, x.detach(), check_trace=False)(x)  # type: ignore[no-any-return,no-untyped-call]


def _exported(m: nn.Module, x: Tensor) -> Tensor:
    return torch.export.export(m, (x.detach().clone(),)).module()(x)  # type: ignore[no-any-return]


def _saved(m: nn.Module, x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(x)  # type: ignore[no-any-return]


def _hooked(m: nn.Module, x: Tensor) -> Tensor:
    handles = [m.register_forward_pre_hook(lambda _, a: (a[0] * 2,)), m.register_forward_hook(lambda *a: a[2] + 1)]
    y = m(x)
    for handle in handles:
        handle.remove()
    return y  # type: ignore[no-any-return]


def _wrapped(m: nn.Module, x: Tensor) -> Tensor:
    inner = m.forward
    m.forward = lambda *a, **k: inner(*a, **k) * 2  # type: ignore[method-assign]
    y = m(x)
    del m.forward
    return y  # type: ignore[no-any-return]


def _jvp(m: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(m, (x.detach(),), (torch.ones_like(x),))[1]


def _forward_ad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        y = m(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(y).tangent.clone()  # type: ignore[no-any-return,union-attr]


def _without_grad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m(x)  # type: ignore[no-any-return]


def _inference(m: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return m(x)  # type: ignore[no-any-return]


def _functional(m: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(m, {k: v * 2 for k, v in m.named_parameters()}, (x,))  # type: ignore[no-any-return]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "turned": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "empty": lambda x: x[:0],
    "one": lambda x: x[:1],
    "without batch": lambda x: x[0],
    "without elements": lambda x: x[..., :0],
    "another axis": lambda x: x[None],
    "one feature short": lambda x: x.narrow(1, 0, max(x.shape[1] - 1, 0)).narrow(-1, 0, x.shape[-1] - 1),
    "a number": lambda x: x.flatten()[0],
}
WAYS: dict[str, Call] = {
    "call": lambda m, x: m(x),
    "forward": lambda m, x: m.forward(x),
    "keyword": lambda m, x: m(input=x) if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv1d | nn.Conv3d) else m(x),
    "eval": lambda m, x: m.eval()(x),
    "no_grad": _without_grad,
    "no_grad, eval": lambda m, x: _without_grad(m.eval(), x),
    "inference mode": _inference,
    "autocast": _autocast,
    "written to before": lambda m, x: m((x * 1).mul_(2)),
    "written to after": lambda m, x: m(x).mul_(2),
    "relu_ after": lambda m, x: F.relu_(m(x)),
    "part written to after": lambda m, x: _zeroed(m(x)),
    "view after": lambda m, x: m(x).view(-1),
    "twice": lambda m, x: m(x) + m(x * 2),
    "checkpoint": lambda m, x: checkpoint.checkpoint(m, x, use_reentrant=False),
    "reentrant checkpoint": lambda m, x: checkpoint.checkpoint(m, x * 1, use_reentrant=True),
    "trace": _traced,
    "script": lambda m, x: torch.jit.script(m)(x),
    "export": _exported,
    "fx": lambda m, x: torch.fx.symbolic_trace(m)(x),
    "deepcopy": lambda m, x: copy.deepcopy(m)(x),
    "pickle": lambda m, x: pickle.loads(pickle.dumps(m))(x),
    "torch.save": _saved,
    "hooks": _hooked,
    "forward wrapped": _wrapped,
    "functional_call": _functional,
    "vmap": lambda m, x: torch.func.vmap(m)(x[None]),
    "jvp": _jvp,
    "forward mode": _forward_ad,
    "half": lambda m, x: m(x.half()),
    "double": lambda m, x: m(x.double()),
    "double layer": lambda m, x: m.double()(x.double()),
    "bfloat16 layer": lambda m, x: m.bfloat16()(x.bfloat16()),
    "integers": lambda m, x: m(x.long()),
    "booleans": lambda m, x: m(x > 0),
    "complex": lambda m, x: m(x.cfloat()),
    "complex layer": lambda m, x: m.to(torch.complex64)(x.cfloat()),
    "integers, autocast": lambda m, x: _autocast(m, x.long()),
    "double, autocast": lambda m, x: _autocast(m, x.double()),
    "meta": lambda m, x: m.to("meta")(x.to("meta")),
    "subclass": lambda m, x: m(x.as_subclass(Tagged)),
    "parameter": lambda m, x: m(nn.Parameter(x.detach())),
    "sparse": lambda m, x: m(x.to_sparse()),
    "list": lambda m, x: m(x.tolist()),
    "no argument": lambda m, x: m(),
}


MAY_WRITE = ("written to after", "relu_ after", "part written to after")


def _zeroed(y: Tensor) -> Tensor:
    y[..., 0] = 0
    return y


def _result(module: nn.Module, way: Call, x: Tensor) -> dict[str, Any]:
    """What a call gives: tensors by name, or the type of the error."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(True)
    try:
        y = way(module, x)
        found = {"output": y.detach(), "recorded": y.requires_grad, "type": type(y)}
        if y.requires_grad and not y.is_meta:
            weight = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
            (y * weight).sum().abs().backward()
            found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
            found["gradient of the input"] = x.grad
        return found
    except Exception as error:  # noqa: BLE001 - whatever it is, the twin has to raise the same
        return {"error": type(error)}


def _check(name: str, layout: str, way: str) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(5)
    plain, x = make(), LAYOUTS[layout](torch.randn(shape))
    twin = copy.deepcopy(plain)
    assert not any(row.reason for row in exactly_converted(twin).rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, found = (_result(module, WAYS[way], x) for module in (plain, twin))
    if name.startswith("relu") and way in MAY_WRITE and "error" in expected:
        assert "output" in found  # torch keeps the output of a ReLU for backward, the twin does not
        return
    assert found.keys() == expected.keys(), (expected, found)
    for key, wanted in expected.items():
        if not isinstance(wanted, Tensor):
            assert found[key] == wanted, (key, found[key], wanted)
            continue
        assert (found[key].dtype, found[key].shape, found[key].device) == (wanted.dtype, wanted.shape, wanted.device)
        strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (found[key], wanted)]
        assert strides[0] == strides[1], key  # an axis of size one has any
        if wanted.is_meta or not wanted.numel():
            continue
        loose = wanted.dtype in (torch.bfloat16, torch.float16) or "autocast" in way
        bound = 2e-2 if loose else 1e-5  # bfloat16 results are rounded at other places of the sum
        torch.testing.assert_close(found[key], wanted, rtol=bound, atol=bound * max(1.0, float(wanted.abs().max())))


ALIKE = (
    *("linear without bias", "conv2d from one", "conv2d pointwise", "conv2d one image", "conv2d depthwise"),
    *("conv2d circular", "conv2d channels-last weight", "relu"),
)
every_module = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in ALIKE else []) for name in MODULES]
)
"""Of modules that are alike, one in the default tier; every layout of all of them."""


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("name", list(MODULES))
def test_every_layout_of_the_input(name: str, layout: str) -> None:
    for way in ("call", "no_grad", "autocast"):
        _check(name, layout, way)


@pytest.mark.parametrize("way", list(WAYS))
@every_module
def test_every_way_to_call_a_module(name: str, way: str) -> None:
    _check(name, "contiguous", way)
