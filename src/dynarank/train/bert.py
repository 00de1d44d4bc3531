"""A small BERT: a bidirectional transformer that classifies a sentence or a pair of sentences."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.train.transformer import Block, transformer_init_

__all__ = ["BERT"]

_PADDING = 0


class BERT(nn.Module):
    """A bidirectional transformer encoder with pooling and an output layer.

    ``head(tanh(pool(pooled norm(blocks(norm0(embedding[token] + position + segment))))))``

    Like BERT, but pre-norm, which trains from scratch without a long warm-up, and by default with
    mean pooling instead of the first token, [CLS], which is useful only after pre-training.

    Args:
        vocabulary: the number of tokens; token 0 is padding and is masked.
        length: the maximum sequence length.
        outputs: the number of classes, or 1 for a score.
        width: the model width.
        depth: the number of blocks.
        heads: the number of attention heads per block.
        dropout: the dropout probability in each branch.
        pooling: ``"mean"`` of the tokens, or the ``"first"`` one.

    Example:
        >>> model = BERT(100, 16, 2, width=8, depth=1, heads=2)
        >>> tokens = torch.tensor([[2, 7, 8, 3, 0, 0]])
        >>> model(tokens, torch.zeros_like(tokens)).shape
        torch.Size([1, 2])

    Reference:
        Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for Language
        Understanding, arXiv 1810.04805, 2018.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        outputs: int,
        *,
        width: int = 192,
        depth: int = 4,
        heads: int = 6,
        dropout: float = 0.1,
        pooling: Literal["mean", "first"] = "mean",
    ) -> None:
        super().__init__()
        self.length, self.dropout, self.pooling = length, dropout, pooling
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.segment = nn.Embedding(2, width)
        self.norm0 = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)
        transformer_init_(self)

    def forward(self, tokens: Tensor, segments: Tensor) -> Tensor:
        """Compute the outputs ``(B, outputs)``.

        Args:
            tokens: ``(B, T)``, starting with [CLS]; 0 is padding.
            segments: ``(B, T)``: 0 in the first sentence, 1 in the second.

        Raises:
            ValueError: if the sequences are longer than ``length``.
        """
        length = tokens.shape[1]
        if length > self.length:
            raise ValueError(f"a sequence has at most {self.length} tokens, got {length}")
        places = torch.arange(length, device=tokens.device)
        x = self.embedding(tokens) + self.position(places) + self.segment(segments)
        x = F.dropout(self.norm0(x), self.dropout, self.training)
        mask = (tokens != _PADDING)[:, None, None, :]  # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, mask)
        pooled = torch.tanh(self.pool(self._pooled(self.norm(x), tokens != _PADDING)))
        return self.head(F.dropout(pooled, self.dropout, self.training))

    def _pooled(self, x: Tensor, real: Tensor) -> Tensor:
        """Pool ``(B, T, d)`` to one vector per sequence; ``real`` is False at padding."""
        if self.pooling == "first":
            return x[:, 0]
        return (x * real[:, :, None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
