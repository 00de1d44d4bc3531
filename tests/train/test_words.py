"""Whole words: how they are cut, counted and numbered."""

from __future__ import annotations

import pytest

from dynarank.train.words import Words, split_words


def test_cutting() -> None:
    assert split_words("Don't!<br /><br/>10/10, na\u00efve_'quoted'") == [
        *("don't", "!", "10", "10", "na\u00efve", "quoted")
    ]


def test_the_most_frequent_words_are_numbered_from_2_on() -> None:
    words = Words(["b b b a a c", "c d"], size=5)
    assert words.numbers == {"b": 2, "a": 3, "c": 4}  # a before c: the alphabet decides
    assert words.encode(["a b d !"], 4).tolist() == [[3, 2, 1, 1]]


def test_the_end_of_a_long_text_is_kept_and_a_short_one_padded() -> None:
    words = Words(["a b c"], size=10)
    assert words.encode(["a b c", "c", ""], 2).tolist() == [[3, 4], [4, 0], [0, 0]]


def test_a_vocabulary_without_room() -> None:
    with pytest.raises(ValueError, match=r"at least 3 entries, .* got 2"):
        Words(["a"], size=2)
