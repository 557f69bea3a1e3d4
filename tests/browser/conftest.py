"""A browser for the tests of this folder, or one line with the reason why there is none."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.support import find_chromium, open_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


class Watched:
    """A page, what it asked the network for, and what its scripts complained of."""

    def __init__(self, page: "Page", home: str) -> None:
        self.page = page
        self.strangers: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self._note(request.url, home))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)

    def _note(self, url: str, home: str) -> None:
        if not url.startswith(home):
            self.strangers.append(url)


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    if find_spec("playwright") is None:
        pytest.skip("playwright is not installed: make test-browser, or pip install 'opdlab[browser]'")
    if find_chromium() is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the path")
    with open_browser() as opened:
        yield opened


@pytest.fixture
def visit(browser: "Browser") -> Iterator[Callable[..., Watched]]:
    """Open an address; ``home`` is what requests may begin with."""
    contexts = []

    def go(address: str | Path, home: str | None = None, **options: Any) -> Watched:
        url = address.absolute().as_uri() if isinstance(address, Path) else address
        contexts.append(browser.new_context(viewport={"width": 1360, "height": 900}, **options))
        watched = Watched(contexts[-1].new_page(), home or url)
        watched.page.goto(url)
        return watched

    yield go
    for context in contexts:
        context.close()
