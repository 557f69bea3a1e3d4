"""TensorBoard's display of a run."""

from collections.abc import Callable, Iterator

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tokenizers import decoders

from opdlab.callbacks import GateMonitor, SampleLogger
from tests.browser.conftest import Watched
from tests.browser.support import serve_tensorboard
from tests.toy_run import Run

pytestmark = pytest.mark.browser

HOSTILE = (
    "<script>window.hacked=1</script><img src=http://evil.test/a onerror='window.hacked=2'>![](http://evil.test/b)"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard on a run whose student writes markup: each ``:`` of the toy's answers decodes to it."""
    folder = tmp_path_factory.mktemp("runs")
    run = Run(folder, callbacks=(GateMonitor(every_n_steps=2), SampleLogger(every_n_steps=2)))
    hostile = f"\n```\n\n# {HOSTILE}\n\n"
    run.module.student.tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(":", hostile), decoders.Fuse()]
    )
    run.fit(4, logger=TensorBoardLogger(str(folder), name="", version="toy"))
    with serve_tensorboard(folder) as url:
        yield url


def test_histograms_of_the_gate_are_there(visit: Callable[..., Watched], address: str) -> None:
    watched = visit(f"{address}#histograms", address)
    title = watched.page.get_by_text("gate/block/000", exact=True)
    outlines = watched.page.locator("tf-histogram-loader").filter(has=title).locator("path.outline")
    outlines.nth(1).wait_for(timeout=30_000)
    assert outlines.count() == 2  # steps 2 and 4
    assert (watched.complaints, watched.strangers) == ([], [])


def test_hostile_text_stays_text_in_tensorboard(visit: Callable[..., Watched], address: str) -> None:
    watched = visit(f"{address}#text", address)
    shown = watched.page.locator("pre code").filter(has_text=HOSTILE).first
    shown.wait_for(timeout=30_000)
    assert "```" in shown.inner_text()
    assert shown.locator("*").count() == 0
    assert watched.page.evaluate("window.hacked") is None
    assert (watched.complaints, watched.strangers) == ([], [])
