"""``nn.MultiheadAttention`` with quantised projections.

torch's own forward is one opaque call that reads the raw weights, so the twin writes the attention out: query, key,
value and output projections run quantised, scores and softmax stay in the input's precision. Checks of shapes and masks
are torch's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.activation import (  # noqa: F401 - names that TorchScript looks for here
    _arg_requires_grad,
    _check_arg_device,
    _is_make_fx_tracing,
)
from torch.overrides import handle_torch_function, has_torch_function

from lightning_eff.precision.layers.linear import apply_linear
from lightning_eff.precision.layers.state import LayerState
from lightning_eff.precision.layers.twins import STATE, Twin, active_state, run_plain, takes


class AttentionTwin(Twin, nn.MultiheadAttention):
    """Runs :class:`torch.nn.MultiheadAttention` with quantised projections; ``out_proj`` has a state of its own."""

    CALLED = (*Twin.CALLED, "merge_masks")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`torch.nn.MultiheadAttention.forward`; same arguments, shapes and results."""
        masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return _attend(self, query, key, value, *masks)


AttentionTwin.forward.__wrapped__ = nn.MultiheadAttention.forward  # type: ignore[attr-defined]
"""TorchScript compiles what is wrapped: a script holds plain layers."""


def _attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    flags = (need_weights, attn_mask, average_attn_weights, is_causal)
    state = active_state(module, query, key, value)
    if state is not None and _is_fused_nested(query, key, value, key_padding_mask, attn_mask):
        return _attend_nested(module, query, *flags)
    nested = query.is_nested or key.is_nested or value.is_nested
    if state is not None and not nested and has_torch_function((query, key, value)):
        arguments = (module, query, key, value, key_padding_mask, *flags)
        return handle_torch_function(_attend, (query, key, value), *arguments)
    takes_it = state is not None and not nested and _takes(module, state, query, key, value)
    if state is None or not takes_it or (is_causal and attn_mask is None):  # torch wants a mask and says so
        return run_plain(module, query, key, value, key_padding_mask, *flags)
    fused = _is_fused(module, query, key, value)
    batched = F._mha_shape_check(  # type: ignore[attr-defined]
        query, key, value, key_padding_mask, attn_mask, module.num_heads
    )
    if not batched:
        same_key, same_value = key is query, value is key
        query = query.unsqueeze(0)
        key = query if same_key else key.unsqueeze(0)
        value = key if same_value else value.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not module.batch_first:
        same_key, same_value = key is query, value is key
        query = query.transpose(0, 1)
        key = query if same_key else key.transpose(0, 1)
        value = key if same_value else value.transpose(0, 1)
    q, k, v = _project(module, state, query, key, value)
    hint = is_causal and key_padding_mask is None and not need_weights
    mask = None if hint else _mask(q, k, key_padding_mask, attn_mask)
    context, weights = _scores(module, q, k, v, mask, causal=hint, need_weights=need_weights)
    rows = context.permute(2, 0, 1, 3).flatten(2)  # sequence first, torch's order of rows
    out = apply_linear(rows, module.out_proj.weight, module.out_proj.bias, module.out_proj.__dict__[STATE])
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if not batched:
        return out.squeeze(1), None if weights is None else weights.squeeze(0)
    out = out.transpose(0, 1) if module.batch_first else out
    return out.contiguous() if fused else out, weights


def _takes(module: nn.MultiheadAttention, state: LayerState, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether all four projections are quantised now; torch computes or refuses the rest."""
    packed, bias = module.in_proj_weight, module.in_proj_bias
    separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    parts = list(zip((query, key, value), separate if packed is None else (packed,) * 3, strict=True))
    if any(x.shape[-1:] != w.shape[1:] for x, w in parts) or key.shape[:-1] != value.shape[:-1]:
        return False
    for x, w in parts:  # a gradient that passes one of them is enough
        state.is_on_path(x, w)
    return all(takes(state, x, w, bias) for x, w in parts)


def _project(
    module: nn.MultiheadAttention, state: LayerState, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Project (N, L, E) inputs to three (N, heads, L, head_dim); one product where the inputs are one tensor."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if weight is not None and query is key and key is value:
        parts = apply_linear(query, weight, bias, state).chunk(3, dim=-1)
    else:
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        weights = separate if weight is None else weight.chunk(3)
        inputs = (query, key, value)
        parts = tuple(apply_linear(x, w, b, state) for x, w, b in zip(inputs, weights, biases, strict=True))
    q, k, v = (p.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2) for p in parts)
    return q, k, v


def _mask(q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None) -> Tensor | None:
    """Return the sum of both masks as numbers to add to the scores, broadcastable to (N, heads, L, S)."""
    padding = F._canonical_mask(padding, "key_padding_mask", F._none_or_dtype(attention), "attn_mask", q.dtype)
    mask = F._canonical_mask(attention, "attn_mask", None, "", q.dtype, check_other=False)
    images, heads, length, source = *q.shape[:3], k.shape[2]
    if mask is not None:
        wanted = (images * heads, length, source) if mask.dim() == 3 else (length, source)
        if mask.shape != wanted:
            raise RuntimeError(
                f"The shape of the {mask.dim()}D attn_mask is {tuple(mask.shape)}, but should be {wanted}."
            )
        mask = mask.view(images, heads, length, source) if mask.dim() == 3 else mask
    if padding is None:
        return mask
    F._check_key_padding_mask(padding, source, images)  # type: ignore[attr-defined]
    padding = padding.view(images, 1, 1, source)
    return padding if mask is None else mask + padding


def _scores(
    module: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the context (N, heads, L, head_dim), and the weights (N, heads, L, S) if they are needed."""
    dropout = module.dropout if module.training else 0.0
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal), None
    scores = (q * math.sqrt(1.0 / module.head_dim)) @ k.transpose(-2, -1)
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    weights = F.dropout(weights, dropout) if dropout > 0 else weights
    return weights @ v, weights


def _is_fused(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether torch would take its fused inference path, whose result is contiguous."""
    plain = not (module.training or torch.is_grad_enabled() or torch.is_autocast_enabled(query.device.type))
    fits = query is key and key is value and module.in_proj_bias is not None and module.num_heads % 2 == 0
    return plain and fits and module._qkv_same_embed_dim and torch.backends.mha.get_fastpath_enabled()


def _is_fused_nested(query: Tensor, key: Tensor, value: Tensor, *masks: Tensor | None) -> bool:
    """Return whether torch's fused inference path takes this call with a nested tensor: then so do we."""
    same = query is key and key is value and query.is_nested and query.layout is torch.strided
    return same and all(mask is None for mask in masks) and not torch.is_grad_enabled()


def _attend_nested(module: nn.MultiheadAttention, query: Tensor, *flags: Any) -> tuple[Tensor, Tensor | None]:
    """Attend over the parts of a nested tensor, by padding it."""
    padded, lengths = query.to_padded_tensor(0.0), query._nested_tensor_size()[:, 0]
    padding = (
        torch.arange(padded.shape[1], dtype=torch.int64, device=padded.device) >= lengths.to(padded.device)[:, None]
    )
    out, weights = _attend(module, padded, padded, padded, padding, *flags)
    return torch._nested_tensor_from_mask(out, padding.logical_not()), weights
