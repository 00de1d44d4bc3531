"""A small GPT: an autoregressive transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.train.transformer import Block, transformer_init_

__all__ = ["GPT"]


class GPT(nn.Module):
    """An autoregressive transformer that predicts the next token.

    ``head(norm(blocks(embedding[token] + position)))``

    Args:
        vocabulary: the number of tokens; 256 for bytes.
        context: the maximum sequence length.
        width: the model width.
        depth: the number of blocks.
        heads: the number of attention heads per block.
        dropout: the dropout probability in each branch.

    Example:
        >>> GPT(256, 16, width=8, depth=1, heads=2)(torch.zeros(3, 16, dtype=torch.long)).shape
        torch.Size([3, 16, 256])

    Reference:
        Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 128,
        *,
        width: int = 192,
        depth: int = 4,
        heads: int = 6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.context, self.dropout = context, dropout
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, dropout=dropout, causal=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        transformer_init_(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits ``(B, T, vocabulary)`` of the tokens after ``tokens``, ``(B, T)``.

        Raises:
            ValueError: if the sequences are longer than the context.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"a sequence has at most {self.context} tokens, got {length}")
        places = torch.arange(length, device=tokens.device)
        x = self.embedding(tokens) + self.position(places)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
