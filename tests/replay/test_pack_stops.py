"""Signals while a pack is written: one line, the exit code of a signal, and nothing half written."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opdlab.cli import main
from opdlab.files import PARTIAL
from opdlab.replay import pack
from opdlab.replay.record import save_tensors


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Take Ctrl-C as a shell does, which a background job does not."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(("name", "at", "earlier"), [("SIGINT", 1, True), ("SIGTERM", 3, False), ("SIGTERM", 4, True)])
def test_a_stopped_pack_leaves_nothing(
    run: Path,
    tmp_path: Path,
    name: str,
    at: int,
    earlier: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    packs, places = tmp_path / "packs", []
    packs.mkdir()
    if earlier:
        (packs / "run.pack").write_bytes(b"earlier")

    def sending(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            places.append(function.__name__)
            if len(places) == at:
                assert {path.suffix for path in packs.iterdir()} >= {PARTIAL}  # there is something to remove
                signal.raise_signal(getattr(signal, name))
            return function(*arguments)

        return wrapped

    # Weights, rollouts and fresh rollouts of the step are written, and the file gets its name.
    monkeypatch.setattr(pack, "save_tensors", sending(save_tensors))
    monkeypatch.setattr(Path, "replace", sending(Path.replace))
    arguments = ["--pack", "packs/run.pack", "--steps", "2", "--draws", "2"]
    assert main(["replay", str(run), *arguments]) == 128 + getattr(signal, name)
    assert places == (["save_tensors"] * 3 + ["replace"])[:at]
    said = {"SIGINT": "Ctrl-C"}.get(name, name)
    assert capfd.readouterr().err.splitlines()[-1] == f"opdlab: stopped by {said}; to go on, run the same command"
    assert {path.name: path.read_bytes() for path in packs.iterdir()} == ({"run.pack": b"earlier"} if earlier else {})
