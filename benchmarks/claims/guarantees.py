"""Guarantees: the bounds that the tests named there hold, and how many trials they make."""

from __future__ import annotations

PAGE = "docs/guarantees.md"
SETTINGS = (
    "unchanged: fp64 1e-12, fp32 1e-5, relative",
    "the losses of one process (1e-5; BatchNorm in fp64 1e-12)",
    "equal those of one to 1e-5",
    "outputs (1e-6 in fp32, 1e-12 in fp64)",
    "to 1e-6 of the largest output",
    "above 10% a merge warns",
    "what is chosen costs at most .62 of full rank",
    "the memory of a step within 2%",
    "verification is under 5% of the processor time",
    "such a run costs what was predicted within 1%",
    "the full-rank window is within 5% of the run",
    "as counted, within 1%; for a memory budget",
    "after at most 64 steps or 1% of the run",
    "| 200 times `kill -9` at random",
    "| 3,000 flipped bits; 500 cut files |",
    "| 10,000 mutated manifests and JSON files |",
    "| 1,000 random sequences of events |",
    "| difference 0.0, or the order is refused |",
    "may be up to 100 times too large",
)
