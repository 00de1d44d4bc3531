"""A bidirectional LSTM text classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BiLSTM"]

_PADDING = 0


class BiLSTM(nn.Module):
    """Word embeddings, a bidirectional LSTM, and an output layer on mean and max pooling.

    ``head([mean_t h_t, max_t h_t])``, h the states of both directions, t over the words

    All sequences have the same length and end with padding, whose embedding is zero and whose
    states are not pooled; the backward direction reads it before the words.

    Args:
        vocabulary: the number of words; word 0 is padding.
        outputs: the number of classes, or 1 for a score.
        width: the size of the embedding.
        hidden: the hidden size per layer and direction.
        depth: the number of layers.
        dropout: the dropout probability of embeddings, layer outputs and pooled states.

    Example:
        >>> model = BiLSTM(100, 2, width=8, hidden=4, depth=1)
        >>> model(torch.tensor([[5, 6, 7, 0, 0]])).shape
        torch.Size([1, 2])

    Reference:
        Hochreiter and Schmidhuber, Long Short-Term Memory, Neural Computation 9, 1997; Graves and
        Schmidhuber, Framewise phoneme classification with bidirectional LSTM, Neural Networks 18,
        2005.
    """

    def __init__(
        self,
        vocabulary: int,
        outputs: int = 2,
        *,
        width: int = 128,
        hidden: int = 128,
        depth: int = 1,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=_PADDING)
        self.lstm = nn.LSTM(
            width,
            hidden,
            depth,
            batch_first=True,
            bidirectional=True,
            dropout=dropout if depth > 1 else 0.0,  # torch applies it between layers
        )
        self.head = nn.Linear(4 * hidden, outputs)
        _init_(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the outputs ``(B, outputs)`` of words ``(B, T)``; 0 is padding."""
        x = F.dropout(self.embedding(tokens), self.dropout, self.training)
        states, _ = self.lstm(x)  # (B, T, 2 hidden)
        words = (tokens != _PADDING)[:, :, None]
        mean = (states * words).sum(1) / words.sum(1).clamp(min=1)
        # An empty text has no maximum: zeros are used instead.
        most = states.masked_fill(~words, -1.0).amax(1)  # a state is above -1
        pooled = torch.cat([mean, most * words.any(1)], dim=1)
        return self.head(F.dropout(pooled, self.dropout, self.training))


def _init_(model: BiLSTM) -> None:
    """Embeddings with standard deviation 0.1; forget gates start open (Jozefowicz et al., 2015)."""
    nn.init.normal_(model.embedding.weight, std=0.1)
    with torch.no_grad():
        model.embedding.weight[_PADDING].zero_()
        for name, parameter in model.lstm.named_parameters():
            if name.startswith("bias_ih"):
                parameter.chunk(4)[1].fill_(1.0)  # torch's order: input, forget, cell, output
