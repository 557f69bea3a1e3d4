"""Takes the pictures of "See the gates" in Chromium: of TensorBoard and of the pages of rollouts.

``python docs/scripts/screenshots.py [FOLDER]``. FOLDER holds the two runs that the guide tells of, ``block64`` and
``none``; those that are missing are made first, about a minute each. Without it, both are made in a temporary folder.
Needs the extra ``browser``, an installed Chromium, and Pillow, which matplotlib brings along.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page

from opdlab.cli import main as opdlab

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/pictures"
RUN = ["fit", "-c", "quickstart", "-c", "harsh_reuse", "--gate_monitor.every_n_steps", "2"]
GATES = {"block64": ["--model.gate.tau", "5"], "none": ["--model.gate", "none"]}  # options by the run's folder
WAIT = 30_000  # milliseconds for a page to be drawn
_LIMIT = 200_000  # bytes of a picture
WINDOW = (0, 0, 1280, 820)  # left, top, width and height of what is shown, pixels
_PANE = (331, 64, 745, 656)  # of TensorBoard, without the choices on the left and the bar above
# Of TensorBoard: the picture's name, the page, what is there once it is drawn, and the part that is shown.
ONE_RUN = (
    ("histograms", "histograms&tagFilter=gate/block", "vz-histogram-timeseries .histogram", _PANE),
    ("images", "images&tagFilter=gate/(heat_map|by_age)", "tf-image-loader img", _PANE),
)
BOTH_RUNS = (
    ("custom-scalars", "custom_scalars", "tf-custom-scalar-multi-line-chart-card", _PANE),
    ("hparams", "hparams", "tf-hparams-query-pane paper-checkbox", (257, 64, 1023, 205)),
)
_HIDDEN = ("lr", "objective", "reuse.epochs")  # columns that are the same in both runs


def main() -> None:
    """Make the runs that are not there yet, and take all pictures."""
    sys.path.insert(0, str(ROOT))
    from tests.browser.support import open_browser, serve_tensorboard

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where the runs are, or are made; else a temporary one")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        for gate in GATES:
            make_run(folder / gate, gate)
        with open_browser() as browser:
            take_rollouts(browser, folder / "block64/version_0")
            for runs, pages in ((folder / "block64", ONE_RUN), (folder, BOTH_RUNS)):
                with chdir(runs.parent), serve_tensorboard(Path(runs.name)) as address:  # it shows the path it is given
                    for name, place, drawn, part in pages:
                        url = f"{address}?darkMode=false#{place}"
                        take(browser, url, f"tensorboard-{name}", _waiting_for(drawn), part)


def make_run(folder: Path, gate: str) -> None:
    """A run that the guide tells of, unless it is there."""
    if folder.is_dir():
        return
    if opdlab([*RUN, *GATES[gate], "--trainer.default_root_dir", str(folder)]) != 0:
        raise SystemExit("the run failed")


def _waiting_for(selector: str) -> Callable[[Page], None]:
    def wait(page: Page) -> None:
        page.locator(selector).first.wait_for(timeout=WAIT)
        for name in _HIDDEN if "hparams" in selector else ():
            page.locator(selector).filter(has_text=name).first.click()

    return wait


def take_rollouts(browser: Browser, run: Path) -> None:
    """The first page of rollouts, where the student learns fastest, coloured by drift and by weight."""
    address = min((run / "rollouts").glob("step-*.html")).as_uri()
    for quantity in ("drift", "weight"):
        take(browser, address, f"viewer-{quantity}", _colored_by(quantity))


def _colored_by(quantity: str) -> Callable[[Page], None]:
    def choose(page: Page) -> None:
        page.wait_for_selector("#quantity option", state="attached", timeout=WAIT)
        page.select_option("#quantity", value=quantity)

    return choose


def take(
    browser: Browser,
    address: str,
    name: str,
    prepare: Callable[[Page], None],
    part: tuple[int, int, int, int] = WINDOW,
) -> None:
    """Open a page, prepare it, and write what is seen of it.

    Args:
        browser: to open it in.
        address: of the page.
        name: of the picture.
        prepare: waits until the page is drawn, and clicks what is to be clicked.
        part: left, top, width and height of what is shown, pixels of the window.
    """
    _, _, width, height = WINDOW
    # Three pixels for two, so that figures can be read where a page shows the picture smaller.
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light", device_scale_factor=1.5)
    page.goto(address)
    prepare(page)
    page.wait_for_timeout(1500)  # animations
    left, top, width, height = part
    clip = {"x": left, "y": top, "width": width, "height": height}
    write(page.screenshot(clip=clip), FOLDER / f"{name}.png")
    page.close()


def write(picture: bytes, file: Path) -> None:
    """Write a PNG with 128 colours, which is a third of the bytes and looks the same."""
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(128).save(file, optimize=True)
    if (size := file.stat().st_size) > _LIMIT:
        raise SystemExit(f"{file} has {size} bytes, more than {_LIMIT}: show less")


if __name__ == "__main__":
    main()
