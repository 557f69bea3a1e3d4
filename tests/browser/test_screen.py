"""The page of a screening, opened in a browser from the disk: a narrow screen shows every column."""

from collections.abc import Callable
from pathlib import Path

import pytest

from opdlab.screening import render_page, screen
from tests.browser.conftest import Watched
from tests.screening.pairs import SHORT, make_pair
from tests.toy_run import STUDENT

pytestmark = pytest.mark.browser


def test_a_phone_shows_findings_without_scrolling_sideways(visit: Callable[..., Watched], tmp_path: Path) -> None:
    path = tmp_path / "screen.html"
    path.write_text(render_page(screen(make_pair(teacher=STUDENT), SHORT), {"seed": "0"}))
    watched = visit(path)
    watched.page.set_viewport_size({"width": 390, "height": 740})
    assert watched.page.evaluate("() => document.querySelector('main').scrollWidth") <= 390
    assert watched.page.locator(".finding").first.is_visible()
    assert watched.complaints == []
