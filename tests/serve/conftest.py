"""A server whose engine the test is, and a browser with the page, which alone needs selenium."""

from collections.abc import Iterator
from typing import Any

import pytest
from serving import Running, fresh, scripted
from stub_server import STORY, serving


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with scripted() as server:
        yield server


@pytest.fixture
def server(shared: Running) -> Running:
    """Of an engine whose pieces the test hands out; nothing has been asked yet."""
    return fresh(shared)


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
