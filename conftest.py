"""Every docstring's example runs, with torch, nn and dr at hand."""

from __future__ import annotations

import pytest
import torch

import dynarank as dr


@pytest.fixture(autouse=True)
def names_in_examples(doctest_namespace: dict[str, object]) -> None:
    """Give the examples the names a user would have imported."""
    doctest_namespace.update(torch=torch, nn=torch.nn, dr=dr)
