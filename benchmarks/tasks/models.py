"""The networks of the examples and benchmarks, as plain ``torch.nn`` modules.

Letters in shapes: B batch, T tokens, D model width, H heads, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "DigitsNet", "ResNet18", "mlp"]


def mlp(width: int = 1024, depth: int = 3) -> nn.Sequential:
    """Return ``depth`` square linear layers with ReLU in between."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DigitsNet(nn.Sequential):
    """Four convolutions and two linear layers for 8x8 grey images: (B, 1, 8, 8) -> (B, classes).

    The stem and the classifier are the two layers most 4-bit recipes leave alone; four layers are left to quantise.
    """

    def __init__(self, width: int = 32, num_classes: int = 10) -> None:
        def conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        super().__init__(
            *conv(1, width),
            *conv(width, width),
            *conv(width, 2 * width, stride=2),
            *conv(2 * width, 2 * width),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )


class Block(nn.Module):
    """Pre-norm transformer block with causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def attend(self, x_BTD: Tensor) -> Tensor:
        """Return causal multi-head attention over the tokens."""
        b, t, d = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y_BHTd = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y_BHTd.transpose(1, 2).reshape(b, t, d))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Add attention and the feed-forward layer to the residual stream."""
        x_BTD = x_BTD + self.attend(self.norm1(x_BTD))
        return x_BTD + self.out(F.gelu(self.fc(self.norm2(x_BTD))))


class GPT(nn.Module):
    """Decoder-only transformer over characters: (B, T) token ids -> (B, T, V) logits.

    Args:
        vocabulary: number of token ids, V.
        width: model width, D.
        layers: number of blocks.
        heads: attention heads; divides ``width``.
        context: the longest sequence, T.
    """

    def __init__(
        self, vocabulary: int = 256, width: int = 256, layers: int = 4, heads: int = 4, context: int = 128
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.apply(_small_init)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of the next character at every position."""
        where_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        return self.head(self.norm(self.blocks(self.tokens(ids_BT) + self.positions(where_T))))


def _small_init(module: nn.Module) -> None:
    """Draw linear and embedding weights from N(0, 0.02), as GPT-2 does."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``relu(conv(conv(x)) + shortcut(x))``."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem for 32x32 images: (B, 3, 32, 32) -> (B, classes)."""

    def __init__(self, width: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        blocks: list[nn.Module] = []
        inputs = width
        for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return class logits."""
        y = self.blocks(self.relu(self.bn(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))
