"""The transformer block of the text models.

Legend: B sequences, T tokens, d the width, h heads; shapes in comments.
"""

from __future__ import annotations

import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Block", "transformer_init_"]

_STD = 0.02


class Block(nn.Module):
    """Pre-norm attention and feed-forward network.

    ``x + out(attention(qkv(norm1 x)))``, then ``x + down(gelu(up(norm2 x)))``

    Query, key and value are one product, ``qkv``; all four matrices are plain ``nn.Linear``.

    Args:
        width: d, the model width.
        heads: h, the number of attention heads; must divide d.
        dropout: the dropout probability in each branch.
        causal: whether a token attends only to itself and earlier tokens.

    Raises:
        ValueError: if ``heads`` does not divide ``width``.

    Example:
        >>> Block(8, 2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])

    Reference:
        Vaswani et al., Attention Is All You Need, arXiv 1706.03762, 2017; pre-norm: Xiong et al.,
        On Layer Normalization in the Transformer Architecture, arXiv 2002.04745, 2020.
    """

    def __init__(
        self, width: int, heads: int, *, dropout: float = 0.0, causal: bool = False
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide width, got {heads} heads and width {width}")
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the block to tokens ``(B, T, d)``.

        Args:
            x: the tokens, ``(B, T, d)``.
            mask: bool, ``(B, 1, 1, T)``: the tokens that may be attended to; None: all.
        """
        x = x + self._drop(self._attention(self.norm1(x), mask))
        return x + self._drop(self.down(F.gelu(self.up(self.norm2(x)))))

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, T, d / h) each
        seen = F.scaled_dot_product_attention(query, key, value, mask, is_causal=self.causal)
        return self.out(seen.transpose(1, 2).reshape(batch, tokens, width))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def transformer_init_(model: nn.Module) -> None:
    """GPT-2's initialization: normal weights of standard deviation 0.02 and zero biases.

    With L blocks, the last matrix of each branch has 0.02 / sqrt(2 L), so that the sum of 2 L
    branches does not grow with L (Radford et al., Language Models are Unsupervised Multitask
    Learners, 2019).
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    last = {linear for block in blocks for linear in (block.out, block.down)}
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        std = _STD / math.sqrt(2 * len(blocks)) if module in last else _STD
        nn.init.normal_(module.weight, std=std)
        bias = cast(Tensor | None, getattr(module, "bias", None))
        if bias is not None:
            nn.init.zeros_(bias)
