"""A folder with a tiny sentence encoder of random weights, and one with pairs of sentences."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ["a", "man", "cat", "plays", "eats", "the", "guitar", "fish", "slowly", "today"]


def write_tiny_encoder(folder: Path) -> None:
    """Write ``encoder`` (model and tokenizer) and ``pairs`` (``train.tsv``, ``dev.tsv``)."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    encoder, pairs = folder / "encoder", folder / "pairs"
    encoder.mkdir()
    pairs.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (encoder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256}
    config = BertConfig(vocab_size=len(vocabulary), num_hidden_layers=2, **sizes)
    BertModel(config).save_pretrained(encoder)
    BertTokenizerFast(str(encoder / "vocab.txt")).save_pretrained(encoder)
    draws = torch.randint(len(WORDS), (40, 2, 6)).tolist()
    lines = ["sentence1\tsentence2\tscore"]
    for i, pair in enumerate(draws):
        lines.append("\t".join([*(" ".join(WORDS[w] for w in s) for s in pair), str(i % 5)]))
    for name in ("train.tsv", "dev.tsv"):
        (pairs / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
