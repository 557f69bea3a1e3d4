"""The pages of rollouts, opened in a browser from the disk."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from opdlab.types import Problem
from opdlab.viewer import RolloutText, render_page, visible, write_page
from tests.browser.conftest import Watched
from tests.viewer_pages import HOSTILE, plain_text, shown

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
Visit = Callable[..., Watched]

WORDS = [f"w{index}" for index in range(40)]


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    rollouts = [shown(40), shown(30, seed=1, correct=False)]
    rollouts[0].mask[7], rollouts[0].segment_ids[7] = False, -1
    rollouts[0].values["position_loss"][9] = math.nan
    return write_page(tmp_path, 200, render_page(200, rollouts, [plain_text(WORDS), plain_text(WORDS[:30])]))


def ready(watched: Watched) -> "Page":
    watched.page.wait_for_selector("[data-ready]")
    return watched.page


def colors(page: "Page") -> list[str]:
    script = "all => all.map(token => getComputedStyle(token).backgroundColor)"
    result: list[str] = page.locator(".tokens .t").evaluate_all(script)
    return result


def details(page: "Page") -> dict[str, str]:
    rows = page.locator("#details tr").all()
    return {row.locator("th").inner_text(): row.locator("td").inner_text() for row in rows}


MINUS, DASH = "\u2212", "\u2013"


def read(text: str) -> float:
    return float(text.split()[0].replace(MINUS, "-"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_are_coloured_by_the_chosen_quantity(visit: Visit, page_file: Path, scheme: str) -> None:
    watched = visit(page_file, color_scheme=scheme)
    page = ready(watched)
    by_drift = colors(page)
    assert len(by_drift) == 70
    assert len(set(by_drift)) > 8
    page.select_option("#quantity", "weight")
    by_weight = colors(page)
    assert by_weight != by_drift
    assert len(set(by_weight[:4])) == 1  # a segment has one weight
    assert page.locator("#quantity option").count() == 7
    assert (watched.complaints, watched.strangers) == ([], [])


def test_colours_follow_sign_and_size(visit: Visit, tmp_path: Path) -> None:
    rollout = shown(5)
    rollout.values["entropy"] = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    path = write_page(tmp_path, 1, render_page(1, [rollout], [plain_text(["a"] * 5)]))
    page = ready(visit(f"{path.as_uri()}#entropy", path.as_uri(), color_scheme="light"))
    levels = page.locator(".tokens .t").evaluate_all("all => all.map(token => token.className)")
    shades = [re.sub(r"\b(t|edge)\b", "", name).split() for name in levels]
    assert shades == [["l10", "below"], ["l5", "below"], [], ["l5"], ["l10"]]
    assert len(set(colors(page))) == 5
    assert page.inner_text("#scale").startswith(f"{MINUS}2")
    assert page.get_attribute("#scale", "aria-label") == f"colours of entropy from {MINUS}2 to 2 nats, none at 0"


def test_pointing_at_a_token_shows_the_values_of_the_trace(visit: Visit, page_file: Path) -> None:
    page = ready(visit(page_file))
    first = shown(40)
    page.locator(".tokens .t").nth(13).hover()
    values = details(page)
    assert len(values) == 7
    for label, name in (("drift", "drift"), ("weight", "weight"), ("teacher log-probability", "teacher_logprob")):
        assert read(values[label]) == pytest.approx(float(first.values[name][13]), rel=1e-4)
    text = page.inner_text("#details")
    assert "“w13”" in text
    assert f"token 14 of 40, segment 3 · id {int(first.tokens[13])}" in text


def test_masked_and_broken_values_are_shown_as_such(visit: Visit, page_file: Path) -> None:
    page = ready(visit(page_file))
    page.select_option("#quantity", "position_loss")
    page.locator(".tokens .t").nth(7).hover()
    assert "not in the loss" in page.inner_text("#details")
    assert set(details(page).values()) == {DASH}
    assert "masked" in str(page.locator(".tokens .t").nth(7).get_attribute("class"))
    page.locator(".tokens .t").nth(9).hover()
    assert details(page)["position loss"] == "NaN nats"
    assert "strange" in str(page.locator(".tokens .t").nth(9).get_attribute("class"))


def test_the_keyboard_reaches_every_token_with_one_stop_for_a_response(visit: Visit, page_file: Path) -> None:
    page = ready(visit(page_file))

    def focused() -> str:
        return str(page.evaluate("document.activeElement.textContent"))

    assert page.locator(".tokens .t[tabindex='0']").count() == 2
    page.locator(".tokens .t").first.focus()
    for key, text in {
        "ArrowRight": "w1",
        "ArrowDown": "w4",
        "End": "w39",
        "ArrowLeft": "w38",
        "ArrowUp": "w36",
        "Home": "w0",
    }.items():
        page.keyboard.press(key)
        assert focused() == text
    drift = shown(40).values["drift"]
    page.keyboard.press("e")
    place = int(focused()[1:])
    assert abs(float(drift[place])) > 0.9 * float(drift.abs().max())
    spoken = page.inner_text("#live")
    assert f"token {place + 1} of 40, segment {place // 4}, drift " in spoken
    assert read(spoken.split("drift ")[1]) == pytest.approx(float(drift[place]), rel=1e-4)
    assert page.locator(":focus").get_attribute("aria-label") == f"w{place}"
    assert page.locator(":focus").get_attribute("role") == "option"
    page.keyboard.press("Tab")  # to the other response, beyond all tokens of this one
    while page.evaluate("document.activeElement.tagName") in ("SUMMARY", "PRE"):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.place[0].rollout.id") == 41
    page.keyboard.press("Shift+Tab")
    assert page.locator(".tokens .t[tabindex='0']").first.inner_text() == f"w{place}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_text_stays_text(visit: Visit, tmp_path: Path, scheme: str) -> None:
    everything = "".join(HOSTILE)
    text = RolloutText(everything, HOSTILE, [False] * len(HOSTILE), Problem("1", "p", everything))
    rollout = shown(len(HOSTILE))
    rollout.values["<b>" + HOSTILE[1]] = torch.rand(len(HOSTILE))
    facts = {"gate": visible(everything)}
    watched = visit(write_page(tmp_path, 1, render_page(1, [rollout], [text], facts)), color_scheme=scheme)
    page = ready(watched)
    for index in range(len(HOSTILE)):
        page.evaluate("index => focusToken(cards[0], index)", index)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, iframe, object, main a, main script, main b b").count() == 0
    tokens = page.locator(".tokens .t").evaluate_all("all => all.map(token => token.textContent)")
    assert tokens == [re.sub("[⟨⟩]", "", visible(part)) for part in HOSTILE]
    assert page.locator("pre").first.text_content() == re.sub("[⟨⟩]", "", visible(everything))
    assert (watched.complaints, watched.strangers) == ([], [])


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (color) => {
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll("#scale b")].map((box) => {
    const style = getComputedStyle(box);
    const pair = [luminance(style.color), luminance(style.backgroundColor)].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
}"""


LUMINANCE_OF_NUMBERS = """() => [...document.querySelectorAll("[data-segment]")].map((token) => {
  const { color, backgroundColor } = getComputedStyle(token, "::before");
  const luminance = (text) => {
    const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const [r, g, b, opacity = 1] = text.match(/[\\d.]+/g).map(Number);
    return opacity === 1 ? 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) : NaN;
  };
  const pair = [luminance(color), luminance(backgroundColor)].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_of_segments_can_be_read_on_every_colour(visit: Visit, tmp_path: Path, scheme: str) -> None:
    path = write_page(tmp_path, 1, render_page(1, [shown(40, block=10)], [plain_text(WORDS)]))
    contrasts = ready(visit(path, color_scheme=scheme)).evaluate(LUMINANCE_OF_NUMBERS)
    assert len(contrasts) == 4
    assert min(contrasts) > 4.5


GAPS = """() => [...document.querySelectorAll(".tokens .t + .edge")].map((token) => {
  const stroke = token.getBoundingClientRect().left - 2; // of the shadow
  return stroke - token.previousSibling.getBoundingClientRect().right;
})"""


def test_strokes_stand_between_tokens(visit: Visit, page_file: Path) -> None:
    page = ready(visit(page_file))
    gaps = page.evaluate(GAPS)
    assert len(gaps) > 10
    assert min(gaps) >= 0
    assert page.inner_text("#edges") == "a segment begins"


@pytest.mark.parametrize(("pairs", "said"), [(0, "each token"), (2, "nearly each token")])
def test_segments_of_one_token_are_not_marked(visit: Visit, tmp_path: Path, pairs: int, said: str) -> None:
    rollout = shown(40, block=1)
    rollout.segment_ids[: 2 * pairs] = rollout.segment_ids[: 2 * pairs] // 2 * 2
    page = ready(visit(write_page(tmp_path, 1, render_page(1, [rollout], [plain_text(WORDS)]))))
    assert page.locator(".tokens .edge").count() == 0
    assert page.inner_text("#edges") == f"no strokes: {said} is a segment of its own"


def test_ends_of_the_scale_can_be_told_apart(visit: Visit, tmp_path: Path) -> None:
    rollout = shown(40)
    rollout.values["weight"] = torch.ones(40)
    rollout.values["weight"][::2] += 2**-14
    page = ready(visit(f"{write_page(tmp_path, 1, render_page(1, [rollout], [plain_text(WORDS)])).as_uri()}#weight"))
    ends = re.findall(r"[\d.]{3,}|1", page.inner_text("#scale"))
    assert ends == ["1", "1.0001"]


@pytest.mark.parametrize("width", [320, 400])
def test_nothing_is_wider_than_a_narrow_window(visit: Visit, page_file: Path, width: int) -> None:
    scrolls = "() => document.documentElement.scrollWidth - innerWidth"
    page = ready(visit(page_file))
    page.set_viewport_size({"width": width, "height": 800})
    for quantity in page.locator("#quantity option").evaluate_all("all => all.map(option => option.value)"):
        page.select_option("#quantity", quantity)
        assert page.evaluate(scrolls) <= 0, quantity
    page.click("text=all steps")
    assert page.evaluate(scrolls) <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(visit: Visit, page_file: Path, scheme: str) -> None:
    page = ready(visit(page_file, color_scheme=scheme))
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) == 11
    assert min(contrasts) > 4.5


def test_the_theme_can_be_chosen(visit: Visit, page_file: Path) -> None:
    page = ready(visit(page_file, color_scheme="light"))
    light = colors(page)
    page.click("#theme")
    assert colors(page) == light  # auto, then light
    page.click("#theme")
    assert colors(page) != light
    page.reload()
    page.wait_for_selector("[data-ready]")
    assert page.inner_text("#theme") == "theme: dark"


def test_newlines_break_lines_and_pieces_can_be_reached(visit: Visit, tmp_path: Path) -> None:
    texts = ["one", "\n\n", "two", "", "漢"]
    page = ready(visit(write_page(tmp_path, 1, render_page(1, [shown(5)], [plain_text(texts)]))))
    tops: list[Any] = page.locator(".tokens .t").evaluate_all("all => all.map(t => t.getBoundingClientRect().top)")
    assert tops[2] > tops[0] + 30  # a line and an empty line
    assert page.locator(".tokens").text_content() == "one\n\ntwo漢"
    mark = page.locator(".tokens .t").nth(1).locator(".n").first
    assert mark.evaluate("e => getComputedStyle(e, '::before').content") == '"↵"'
    assert page.locator(".tokens .t").nth(3).bounding_box() is not None


def test_links_lead_from_page_to_page_and_keep_the_quantity(visit: Visit, page_file: Path) -> None:
    write_page(page_file.parent, 400, render_page(400, [shown(40)], [plain_text(WORDS)]))
    watched = visit(page_file.parent / "index.html", page_file.parent.as_uri())
    watched.page.click("text=step 200")
    page = ready(watched)
    page.select_option("#quantity", "teacher_gap")
    page.click("#next")
    page.wait_for_url("**/step-000400.html*")
    page.wait_for_selector("[data-ready]")
    assert page.input_value("#quantity") == "teacher_gap"
    page.click("#prev")
    page.wait_for_url("**/step-000200.html*")
    assert (watched.complaints, watched.strangers) == ([], [])


@pytest.mark.parametrize("fragment", ["%", "%E0%A4%A", "no-such-quantity"])
def test_an_address_that_names_no_quantity_opens_all_the_same(visit: Visit, page_file: Path, fragment: str) -> None:
    watched = visit(f"{page_file.as_uri()}#{fragment}")
    assert ready(watched).locator("#quantity").input_value() == "drift"
    assert watched.complaints == []


def test_long_responses_are_shown_in_full_and_soon(visit: Visit, tmp_path: Path) -> None:
    length = 16_384
    words = [" the", " of", "ing", "\n", "x", ",", "12", " so"] * (length // 8)
    rollouts = [shown(length, seed=seed, block=64) for seed in range(4)]
    path = write_page(tmp_path, 1, render_page(1, rollouts, [plain_text(words)] * 4))
    assert path.stat().st_size < 5e6
    page = ready(visit(path))
    assert page.locator(".tokens .t").count() == 4 * length
    # A generous limit for a busy machine; 1 s on an idle one.
    assert page.evaluate("performance.now()") < 10_000
    page.evaluate("focusToken(cards[3], 16000)")
    assert page.evaluate("document.activeElement.place[1]") == 16_000


def test_the_strip_does_not_lose_a_single_strong_token(visit: Visit, tmp_path: Path) -> None:
    rollout = shown(8000, block=64)
    rollout.values["drift"] = torch.zeros(8000)
    rollout.values["drift"][[2000, 6000]] = torch.tensor([1.0, -1.0])
    page = ready(visit(write_page(tmp_path, 1, render_page(1, [rollout], [plain_text(["x"] * 8000)]))))
    script = """(strip, share) => [0.25, 0.75].map((height) => [...strip.getContext("2d")
        .getImageData(Math.floor(share * strip.width), height * strip.height, 1, 1).data])"""
    upper, lower = page.locator(".strip").evaluate(script, 0.25)
    assert upper[3] == 255  # a bar upwards,
    assert lower[3] == 0
    upper, lower = page.locator(".strip").evaluate(script, 0.75)
    assert upper[3] == 0
    assert lower[3] == 255  # and one downwards
    page.locator(".strip").click(position={"x": page.locator(".strip").evaluate("e => e.clientWidth / 4"), "y": 5})
    assert abs(int(page.evaluate("document.activeElement.place[1]")) - 2000) < 20


def test_printing_is_light_and_shows_every_line(visit: Visit, page_file: Path) -> None:
    page = ready(visit(page_file, color_scheme="dark"))
    dark = colors(page)
    page.emulate_media(media="print")
    assert colors(page) != dark
    assert page.locator("#details").is_hidden()
    assert page.locator(".line").first.evaluate("e => getComputedStyle(e).contentVisibility") == "visible"
