"""Results in words: which words of a page tell one, and sentences beside what proves them."""

from __future__ import annotations

import re

IN_WORDS = ("README.md", "docs/evidence.md", "docs/how-to/choose-a-schedule.md")
"""The pages on which such a word needs a claim, as a figure does."""
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
PARTS = {
    2: "half", 3: "third", 4: "quarter", 5: "fifth", 6: "sixth", 7: "seventh", 8: "eighth",
    9: "ninth", 10: "tenth", 16: "sixteenth",
}  # fmt: skip
WORD = re.compile(
    rf"""
    (?<![\w./^="-]) \d+ (?![\w/^"-]|[.,]\d)  # a number alone
    | \b(?:
        {"|".join(NUMBERS)} | (?:thir|four|fif|six|seven|eigh|nine)ty | hundreds? | thousands?
        | (?:{"|".join(PARTS.values())}|hundredth)s? | halves | second | once | twice | double
        | better | worse | best | worst | faster | slower | more | fewer | less | most | least
        | higher | lower | equal | enough | ahead | behind | beat | won | led | leads
        | (?:in)?distinguishable | all | each | every\w* | both | n?either | none | no | only
    )\b
    """,
    re.VERBOSE | re.IGNORECASE,
)


def says(words: str, *facts: bool) -> str:
    """Return words of a page that these facts prove.

    Raises:
        AssertionError: they do not.
    """
    if not facts or not all(facts):
        raise AssertionError(words)
    return words


def part(share: float) -> str:
    """Return the part that is next to a share, in words.

    Example:
        >>> part(0.199)
        'fifth'
    """
    return PARTS[round(1 / share)]
