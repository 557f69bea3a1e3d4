"""The report of runs and a study, opened in a browser from the disk: themes, narrow screens, print."""

from collections.abc import Callable
from pathlib import Path

import pytest

from opdlab.report import make_report
from tests.browser.conftest import Watched
from tests.report.synthetic_study import SyntheticStudy
from tests.report.test_run_report import write_run

pytestmark = pytest.mark.browser
Visit = Callable[..., Watched]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = write_run(folder / "a/version_0"), write_run(folder / "b/version_0", tau=5.0)
    study = SyntheticStudy({"none": 0.0, "span": 0.2}, range(4), [20, 40], {"toy": 8}, num_samples=8)
    make_report(study.write(folder / "study"), *runs, out=folder / "out").write()
    return folder / "out/report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_stands_alone_in_both_themes(visit: Visit, report: Path, scheme: str) -> None:
    watched = visit(report, color_scheme=scheme)
    page = watched.page
    assert watched.complaints == []
    assert watched.strangers == [] or all(each.startswith("data:") for each in watched.strangers)
    script = "() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; }"
    ink, paper = (sum(int(n) for n in colour.strip("rgb()").split(",")) for colour in page.evaluate(script))
    assert (ink < paper) == (scheme == "light")
    sizes = page.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert len(sizes) >= 8
    assert min(sizes) > 100


def test_a_phone_shows_it_without_scrolling_sideways(visit: Visit, report: Path) -> None:
    page = visit(report).page
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360


def test_it_prints_with_all_text_and_light(visit: Visit, report: Path) -> None:
    page = visit(report, color_scheme="dark").page
    page.emulate_media(media="print")
    colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert sum(int(n) for n in colour.strip("rgb()").split(",")) == 3 * 255
    heights = page.locator("section > pre").evaluate_all("all => all.map(e => e.scrollHeight - e.clientHeight)")
    assert heights
    assert max(heights) <= 1


def test_pictures_are_dark_on_a_dark_page_but_not_in_print(visit: Visit, report: Path) -> None:
    page = visit(report, color_scheme="dark").page
    script = "() => getComputedStyle(document.querySelector('img')).filter"
    assert page.evaluate(script).startswith("invert(1)")
    page.emulate_media(media="print")
    assert page.evaluate(script) == "none"


@pytest.mark.parametrize("media", ["screen", "print"])
def test_numbers_in_tables_are_not_broken(visit: Visit, report: Path, media: str) -> None:
    page = visit(report).page
    page.set_viewport_size({"width": 390, "height": 740})
    page.emulate_media(media=media)
    assert page.locator("td").first.evaluate("e => getComputedStyle(e).overflowWrap") == "normal"


def test_text_of_models_is_text(visit: Visit, report: Path) -> None:
    page = visit(report).page
    assert page.locator("pre img, pre script, pre b").count() == 0
    assert page.get_by_role("heading", name="Differences of configuration").count() == 1
