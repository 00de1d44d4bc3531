"""Commands write no page, but in tests that use ``real_page``."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def page(request: pytest.FixtureRequest) -> None:
    if "real_page" not in request.fixturenames:
        request.getfixturevalue("no_page")


@pytest.fixture
def real_page() -> None:
    """For the tests that need the page."""
