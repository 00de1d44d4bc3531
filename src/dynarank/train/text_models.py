"""The networks of the text recipes, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dynarank.train.bert import BERT
from dynarank.train.bilstm import BiLSTM
from dynarank.train.gpt import GPT

__all__ = ["MODELS"]

MODELS: dict[str, Callable[..., nn.Module]] = {"bert": BERT, "bilstm": BiLSTM, "gpt": GPT}
