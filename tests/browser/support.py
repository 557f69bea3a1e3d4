"""An installed browser and a TensorBoard server, for tests and for scripts that take pictures."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome, None where there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextmanager
def open_browser() -> Iterator["Browser"]:
    """Drive the installed Chromium, without a window; needs playwright, the extra ``browser``.

    Raises:
        RuntimeError: there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    executable = find_chromium()
    if executable is None:
        raise RuntimeError(f"none of {', '.join(_NAMES)} is on the path: install one")
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, the usual user in containers.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def serve_tensorboard(folder: Path, seconds: float = 60) -> Iterator[str]:
    """Run TensorBoard on a folder, on this machine only and on a free port, and stop it at the end.

    Args:
        folder: of one run or several.
        seconds: how long it may take to start and to find the first run.

    Yields:
        Its address, once it shows a run; ends with a slash.

    Raises:
        RuntimeError: it did not start, or found no run, in time; the message has what it wrote.
    """
    # A process of its own, so that it can be stopped. The slow loader is pure Python and available on every platform.
    options = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", "tensorboard.main", *options]
            server = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield _address(server, log, time.monotonic() + seconds)
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _address(server: subprocess.Popen[bytes], log: Path, deadline: float) -> str:
    """Wait until the server has said where it is and lists a run."""
    while time.monotonic() < deadline and server.poll() is None:
        if address := re.search(r"http://[\w.:]+/", log.read_text(errors="replace")):
            with urllib.request.urlopen(f"{address[0]}data/runs", timeout=10) as answer:
                if json.load(answer):
                    return address[0]
        time.sleep(0.2)
    raise RuntimeError(f"TensorBoard did not show a run in time: {log.read_text(errors='replace')[-1000:]}")
