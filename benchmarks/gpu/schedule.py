"""What is run, the most valuable first, and the share of the time that each part may take.

Will it fit? Assumed of an H200: 400 TFLOP/s in dense bf16 at best, 150 in practice, 40 s to compile
a model. A step of 16,384 tokens at depth 12 is 6 x 16,384 x (150, 340, 604) M parameters = 15, 33
and 59 TFLOP at widths 1024, 1536 and 2048, or 0.10, 0.22 and 0.40 s in practice; the eleven forms
of "gpt" cost 0.4 to 1 of that, 0.7 on average. With 4 + 5 x 2 steps each they take
11 x 14 x 0.7 x 0.72 s = 78 s, and making the models 10 s: it fits into 16% of 540 s (86 s), and if
not, the widest model gets fewer repeats. "equal_time" divides what it has. "products" needs
60 x 4 steps of at most 3.3 TFLOP for each candidate, 48 candidates a fifth as large on average:
about 50 s at 150 TFLOP/s and 19 s at 400, repeats end with its time. "convolutions" needs a few
seconds; "resnet" 8 ms a step, if kernel launches limit it, thus 3 s an epoch, four arms, three
epochs: 40 s. "compiled" is last: two to three models at 40 s are all that it can hold. A part
that needs less leaves its time to those after it.
"""

from __future__ import annotations

__all__ = ["GRACE", "SHARES", "allowance"]

SHARES = {
    "gpt": 0.16,
    "equal_time": 0.46,
    "products": 0.06,
    "convolutions": 0.06,
    "resnet": 0.09,
    "compiled": 0.13,
}
"""The parts in order, and their shares of the time; a few percent are left to start and end."""

GRACE = 20.0
"""Seconds after which a part that does not look at its deadline is ended."""


def allowance(part: str, ahead: list[str], left: float) -> float:
    """The seconds that a part may take, of ``left``, with the parts ``ahead`` still to come.

    Example:
        >>> round(allowance("convolutions", ["resnet", "compiled"], 280.0))
        60
    """
    return left * SHARES[part] / (SHARES[part] + sum(SHARES[one] for one in ahead))
