"""What is run, the most valuable first, and the share of the time that each part may take.

Will it fit into 540 s? Assumed of an H200: 400 TFLOP/s in dense bf16 at best, 150 in practice, 15 s
to compile a block.

- gpt: a step of 16,384 tokens at depth 12 is 17, 36 and 64 TFLOP at full rank for widths 1024, 1536
  and 2048; the eleven forms cost 7.2 times as much together; 2 + 5 x 2 steps of each: 10,100 TFLOP,
  67 s in practice, of 100 s; 10 to 15 s to count FLOPs and plan phases in Python. If it takes
  longer, the widest model is repeated less often.
- equal_time: it divides what it has, 275 s, into six runs of about 41 s: at depth 4 a step is 5.4
  TFLOP at full rank, thus 1,100 steps of 16,384 bytes in practice. For a cut 0.3 s a matrix is
  assumed, 5 s in all: two cuts.
- cuts: 7 calls of 11 functions, of which some may take a second.
- products: 52 steps of 48 candidates, 750 TFLOP in all: 5 s in practice; convolutions: 52 steps of
  21 candidates, at most 0.22 TFLOP each: 2 s. In each of 5 turns the device spins for 30 ms first:
  7 and 3 s more.
- resnet: kernel launches limit it; at 10 ms a step an epoch is 4 s, and of large batches 0.5 s:
  two rounds of six arms in 37 s.
- compiled: the last, since it may need all that is left, 58 s or more: at 15 s to compile a form,
  two or three.

A part that needs less leaves its time to those after it.
"""

from __future__ import annotations

__all__ = ["GRACE", "SHARES", "allowance"]

SHARES = {
    "gpt": 0.19,
    "equal_time": 0.52,
    "cuts": 0.02,
    "products": 0.05,
    "convolutions": 0.03,
    "resnet": 0.07,
    "compiled": 0.11,
}
"""The parts in order, and their shares of the time."""

GRACE = 20.0
"""Seconds after which a part that does not look at its deadline is ended."""


def allowance(part: str, ahead: list[str], left: float) -> float:
    """The seconds that a part may take, of ``left``, with the parts ``ahead`` still to come.

    Example:
        >>> round(allowance("convolutions", ["resnet", "compiled"], 280.0))
        40
    """
    return left * SHARES[part] / (SHARES[part] + sum(SHARES[one] for one in ahead))
