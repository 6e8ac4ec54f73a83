"""A browser with the server's page, for the tests that ask for it; only they need selenium."""

from collections.abc import Iterator
from typing import Any

import pytest
from stub_server import STORY, serving


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    """A headless Chromium."""
    from browser import chromium

    with chromium() as chrome:
        yield chrome


@pytest.fixture
def page(driver: Any) -> Iterator[Any]:
    """The page of a server that answers from a script; afterwards the browser's log must hold what was expected."""
    from browser import Page

    with serving() as stub:
        page = Page(driver, stub)
        stub.blocks = STORY
        yield page
        errors = [entry["message"] for entry in driver.get_log("browser")]
        driver.get("about:blank")
    assert not [error for error in errors if not any(words in error for words in page.expected)]
    assert all(any(words in error for error in errors) for words in page.expected)
