"""Laws 3 to 6, all invariants and resuming, after each event of random sequences.

``python -m pytest tests/test_event_sequences.py --sequences 1000`` runs a thousand of them.
"""

from __future__ import annotations

import pytest
from event_sequences import run_sequence


@pytest.mark.slow
def test_random_sequences_of_events(pytestconfig: pytest.Config) -> None:
    for seed in range(pytestconfig.getoption("--sequences")):
        run_sequence(seed)
