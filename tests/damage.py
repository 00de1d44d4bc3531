"""Damaged copies of a file's bytes, for the tests of readers."""

from __future__ import annotations

import hypothesis.strategies as st

__all__ = ["flipped", "mutated"]


def flipped(data: bytes, bit: int) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes after one to four flips, cuts, insertions and duplications."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 64))
        match draw(st.sampled_from(["flip", "cut", "drop", "insert", "repeat"])):
            case "flip" if data:
                data = flipped(data, place * 8 + draw(st.integers(0, 7)))
            case "cut":
                data = data[:place]
            case "drop":
                data = data[:place] + data[place + length :]
            case "insert":
                data = data[:place] + draw(st.binary(max_size=64)) + data[place:]
            case _:
                data = data[: place + length] + data[place:]
    return data
