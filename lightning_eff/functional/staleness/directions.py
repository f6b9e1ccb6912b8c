"""What an optimizer subtracts from a weight per unit of learning rate: the velocity of weight prediction.

For SGD it is the momentum buffer v itself, whatever ``dampening``, ``nesterov`` and ``maximize`` are: as long as v
stays what it is, a step subtracts lr v. Adam and NAdam divide a mean of gradients m by a root mean square:

    Adam     m^ / (sqrt(v^) + eps),     m^ = m / (1 - beta1^t),     v^ = v / (1 - beta2^t)
    NAdam    ((1 - mu_t) / (1 - M_t) m^ + mu_{t+1} / (1 - M_t mu_{t+1}) m) / (sqrt(v^) + eps),
             mu_t = beta1 (1 - 0.96^(t psi) / 2),     M_t = mu_1 mu_2 .. mu_t

The first is exactly what the last step took. NAdam's steps take the newest gradient, too; in its place stands the mean
of the gradients, m^, so that steps of equal gradients are met exactly, from the first on. (Adam's formula is up to 27 %
off there.) Decoupled weight decay, as in AdamW, subtracts the weight times a constant besides.

Legend: m ``exp_avg``, v ``exp_avg_sq``, t ``step``, psi ``momentum_decay``, M ``mu_product``.

References:
    Kingma, Ba, Adam, ICLR 2015, arXiv:1412.6980. Dozat, Incorporating Nesterov Momentum into Adam, ICLR Workshop 2016;
    both as ``torch.optim`` has them. To predict weights like this is not from the paper on pipelined backpropagation,
    which is about SGD; XPipe does (from its abstract). Keep horizons short: long extrapolation of Adam's momentum was
    reported to fail badly (arXiv:2602.19580, abstract only).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Betas = tuple[float, float]


def adam_direction(exp_avg: Tensor, exp_avg_sq: Tensor, step: int, *, betas: Betas, eps: float) -> Tensor:
    """Return what the last step of Adam subtracted per unit of learning rate.

    Args:
        exp_avg: first moment, as in the state of ``torch.optim.Adam``.
        exp_avg_sq: second moment; with ``amsgrad`` the largest so far, ``max_exp_avg_sq``.
        step: number of steps done; 0 gives zeros, as nothing is known yet.
        betas: of the optimizer.
        eps: of the optimizer.

    Example:
        >>> adam_direction(torch.tensor([0.5]), torch.tensor([0.25]), 1, betas=(0.5, 0.75), eps=0.0)
        tensor([1.])
    """
    if step == 0:
        return torch.zeros_like(exp_avg)
    beta1, beta2 = betas
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    return (exp_avg / denominator).div_(1 - beta1**step)


def nadam_direction(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    betas: Betas,
    eps: float,
    momentum_decay: float,
    mu_product: float,
) -> Tensor:
    """Return what a step of NAdam subtracts per unit of learning rate, if the gradient is the mean of those before.

    Args:
        exp_avg: first moment, as in the state of ``torch.optim.NAdam``.
        exp_avg_sq: second moment.
        step: number of steps done; 0 gives zeros, as nothing is known yet.
        betas: of the optimizer.
        eps: of the optimizer.
        momentum_decay: psi, of the optimizer.
        mu_product: M_t, as in its state.

    Example:
        >>> after_one = {"betas": (0.5, 0.75), "eps": 0.0, "momentum_decay": 0.0, "mu_product": 0.25}
        >>> nadam_direction(torch.tensor([0.5]), torch.tensor([0.25]), 1, **after_one)  # 1 + 0.5 * 0.25 / 0.9375
        tensor([1.1333])
    """
    if step == 0:
        return torch.zeros_like(exp_avg)
    beta1 = betas[0]
    now, then = (beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
    of_mean, of_momentum = (1 - now) / (1 - mu_product), then / (1 - mu_product * then)
    factor = of_mean + of_momentum * (1 - beta1**step)
    return adam_direction(exp_avg, exp_avg_sq, step, betas=betas, eps=eps).mul_(factor)
