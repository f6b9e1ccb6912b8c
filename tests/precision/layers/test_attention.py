"""The attention twin: torch's own results when nothing is quantised, whatever the arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.kernels.quantize import sawb_quantize
from lightning_eff.precision.layers import attention
from tests.precision.models import converted

N, L, S, E, H = 2, 5, 7, 8, 2
SELF = ("self", L)
BOOL_2D = torch.ones(L, S, dtype=torch.bool).triu(2)
FLOAT_2D = torch.randn(L, S, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])


def cases() -> dict[str, dict[str, Any]]:
    """Name -> construction, call arguments and flags."""
    per_head = torch.rand(N * H, L, S, generator=torch.Generator().manual_seed(1))
    square = torch.ones(L, L, dtype=torch.bool).triu(1)
    return {
        "self": {"kind": "self"},
        "self causal": {"kind": "self", "call": {"attn_mask": square, "is_causal": True}},
        "self causal without weights": {
            "kind": "self",
            "call": {"attn_mask": square, "is_causal": True, "need_weights": False},
        },
        "cross": {},
        "key is value": {"kind": "memory"},
        "kdim and vdim": {"make": {"kdim": 6, "vdim": 10}},
        "kdim alone": {"make": {"kdim": 6}},
        "no bias": {"make": {"bias": False}},
        "bool mask": {"call": {"attn_mask": BOOL_2D}},
        "float mask": {"call": {"attn_mask": FLOAT_2D}},
        "bool mask per head": {"call": {"attn_mask": per_head > 0.7}, "batched": True},
        "float mask per head": {"call": {"attn_mask": per_head}, "batched": True},
        "padding": {"call": {"key_padding_mask": PADDING}, "batched": True},
        "float padding": {
            "call": {"key_padding_mask": PADDING.float() * -3, "attn_mask": FLOAT_2D},
            "batched": True,
        },
        "padding and mask": {"call": {"key_padding_mask": PADDING, "attn_mask": BOOL_2D}, "batched": True},
        "padding and mask per head": {
            "call": {"key_padding_mask": PADDING, "attn_mask": per_head > 0.7},
            "batched": True,
        },
        "weights per head": {"call": {"average_attn_weights": False}},
        "no weights": {"call": {"need_weights": False}},
        "no weights, padding and mask": {
            "call": {"need_weights": False, "key_padding_mask": PADDING, "attn_mask": BOOL_2D},
            "batched": True,
        },
    }


def inputs(case: dict[str, Any], batch_first: bool, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
    make = case.get("make", {})
    q, k, v = torch.randn(N, L, E), torch.randn(N, S, make.get("kdim", E)), torch.randn(N, S, make.get("vdim", E))
    if not batched:
        q, k, v = q[0], k[0], v[0]
    elif not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    kind = case.get("kind", "cross")
    return (q, q, q) if kind == "self" else (q, k, k) if kind == "memory" else (q, k, v)


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched"])
@pytest.mark.parametrize("training", [True, False])
def test_without_quantisers_it_is_torchs(
    monkeypatch: pytest.MonkeyPatch, name: str, layout: str, training: bool
) -> None:
    case = cases()[name]
    if layout == "unbatched" and case.get("batched"):
        return
    monkeypatch.setattr(attention, "apply_linear", lambda x, w, b, state: F.linear(x, w, b))
    batch_first = layout == "batch first"
    layer = nn.MultiheadAttention(E, H, batch_first=batch_first, **case.get("make", {})).train(training)
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)
    q, k, v = inputs(case, batch_first, layout != "unbatched")
    call = case.get("call", {})
    expected, expected_weights = layer(q, k, v, **call)
    gradients = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    converted(nn.Sequential(layer))
    found, weights = layer(q, k, v, **call)
    torch.testing.assert_close(found, expected)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)
    for grad, wanted in zip(
        torch.autograd.grad(found.square().sum(), list(layer.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["self", "cross", "kdim and vdim"])
def test_all_four_projections_are_quantised(name: str) -> None:
    """With head outputs, scores and softmax in float32: the same attention on INT4 projections."""
    case = cases()[name]
    layer = nn.MultiheadAttention(E, H, batch_first=True, **case.get("make", {}))
    q, k, v = inputs(case, batch_first=True, batched=True)
    if layer.in_proj_weight is None:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        w_q, w_k, w_v = (sawb_quantize(w.detach()) for w in weights)
    elif name == "self":  # one product, one scale
        w_q, w_k, w_v = sawb_quantize(layer.in_proj_weight.detach()).chunk(3)
    else:
        w_q, w_k, w_v = (sawb_quantize(w.detach()) for w in layer.in_proj_weight.chunk(3))
    split = [
        F.linear(sawb_quantize(x), w, b).unflatten(-1, (H, E // H)).transpose(1, 2)
        for x, w, b in zip((q, k, v), (w_q, w_k, w_v), layer.in_proj_bias.chunk(3), strict=True)
    ]
    context = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    converted(nn.Sequential(layer))
    found, _ = layer(q, k, v, need_weights=False)
    # A code of the last projection's input may fall on the other side by a rounding of the scores: allow one such.
    expected = F.linear(sawb_quantize(context), sawb_quantize(layer.out_proj.weight.detach()), layer.out_proj.bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())


def test_dropout_follows_the_mode() -> None:
    layer = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    converted(nn.Sequential(layer))
    x = torch.randn(N, L, E)
    for need_weights in (True, False):
        assert not torch.equal(layer(x, x, x, need_weights=need_weights)[0], layer(x, x, x)[0])
        layer.eval()
        torch.testing.assert_close(layer(x, x, x, need_weights=need_weights)[0], layer(x, x, x)[0])
        layer.train()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [True, False])
def test_inside_torchs_transformer(norm_first: bool) -> None:
    model = nn.Transformer(E, H, 1, 1, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    _, conversion = converted(model)
    assert {name.rpartition(".")[2] for name in conversion.states} == {
        "self_attn",
        "multihead_attn",
        "out_proj",
        "linear1",
        "linear2",
    }
    source, target = torch.randn(N, S, E), torch.randn(N, L, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    model(source, target, tgt_mask=mask, src_key_padding_mask=PADDING).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        first = model(source, target, tgt_mask=mask, tgt_is_causal=True)
        target[:, -1] += 1  # the future does not reach the past through the mask
        second = model(source, target, tgt_mask=mask, tgt_is_causal=True)
    assert first.shape == second.shape == (N, L, E)
