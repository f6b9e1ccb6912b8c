"""``nn.MultiheadAttention`` with quantised projections.

torch's own forward is one opaque call that reads the raw weights, so the twin writes the attention out: query, key,
value and output projections run quantised, scores and softmax stay in the input's precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.precision.layers import STATE, apply_linear
from lightning_eff.precision.state import LayerState


class QuantMultiheadAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` with quantised projections. ``out_proj`` has a state of its own."""

    _eff_state: LayerState

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
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            same_key, same_value = key is query, value is key
            query = query.transpose(0, 1)
            key = query if same_key else key.transpose(0, 1)
            value = key if same_value else value.transpose(0, 1)
        q, k, v = self._project(query, key, value)
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        causal = is_causal and attn_mask is None
        context, weights = self._attend(q, k, v, mask, causal=causal, need_weights=need_weights)
        out = apply_linear(context, self.out_proj.weight, self.out_proj.bias, self.out_proj.__dict__[STATE])
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, L, E) inputs -> three tensors (N, heads, L, head_dim); one product where the inputs are one tensor."""
        state, weight, bias = self._eff_state, self.in_proj_weight, self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if weight is not None and query is key and key is value:
            parts = apply_linear(query, weight, bias, state).chunk(3, dim=-1)
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if weight is None else weight.chunk(3)
            inputs = (query, key, value)
            parts = tuple(apply_linear(x, w, b, state) for x, w, b in zip(inputs, weights, biases, strict=True))
        q, k, v = (p.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for p in parts)
        return q, k, v

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None) -> Tensor | None:
        """The sum of both masks as numbers to add to the scores, broadcastable to (N, heads, L, S)."""
        masks = []
        if attention is not None:
            shape = (-1, self.num_heads, q.shape[2], k.shape[2])
            masks.append(
                _additive(attention, q.dtype).view(shape) if attention.dim() == 3 else _additive(attention, q.dtype)
            )
        if padding is not None:
            masks.append(_additive(padding, q.dtype)[:, None, None, :])
        return sum(masks[1:], masks[0]) if masks else None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            if causal:
                mask = _causal(q, k) if mask is None else mask + _causal(q, k)
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            context = weights @ v
        else:
            if causal and mask is not None:
                mask, causal = mask + _causal(q, k), False
            context = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return context.transpose(1, 2).flatten(2), weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True is forbidden) as zeros and -inf; a float mask as it is."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    return mask.to(dtype)


def _causal(q: Tensor, k: Tensor) -> Tensor:
    forbidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return _additive(forbidden, q.dtype)
