"""A word vocabulary: the most frequent words of the training texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["Words", "split_words"]

PADDING, UNKNOWN = 0, 1
_LINE_BREAK = re.compile(r"<br\s*/?>")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[!?]")


def split_words(text: str) -> list[str]:
    """Split text into lower-case words, ``!`` and ``?``; HTML line breaks are removed.

    Example:
        >>> split_words("It's great!<br />See it.")
        ["it's", 'great', '!', 'see', 'it']
    """
    return _WORD.findall(_LINE_BREAK.sub(" ", text).lower())


class Words:
    """Maps words to numbers: 0 padding, 1 unknown, then by decreasing frequency.

    Args:
        texts: the texts in which to count words; ties are broken alphabetically.
        size: the size of the vocabulary, including padding and unknown.

    Raises:
        ValueError: if ``size`` leaves no room for a word.

    Example:
        >>> words = Words(["a b a", "a c"], size=4)
        >>> words.encode(["c b a b"], length=6).tolist()
        [[1, 3, 2, 3, 0, 0]]
    """

    def __init__(self, texts: Iterable[str], size: int) -> None:
        if size < 3:
            raise ValueError(
                f"a vocabulary has at least 3 entries, 2 of them padding and unknown, got {size}"
            )
        counts = Counter(word for text in texts for word in split_words(text))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        self.numbers = {word: i for i, word in enumerate(ordered[: size - 2], start=2)}

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """Encode texts as numbers ``(N, length)``, int64: the last ``length`` words, then padding.

        Of a longer text the end is kept, since a review's verdict tends to be there.
        """
        found = torch.full((len(texts), length), PADDING)
        for row, text in zip(found, texts, strict=True):
            words = split_words(text)[-length:]
            row[: len(words)] = torch.tensor([self.numbers.get(w, UNKNOWN) for w in words]).long()
        return found
