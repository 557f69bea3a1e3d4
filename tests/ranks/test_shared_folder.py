"""Two processes that do not see one folder are refused before they compute anything, in one line, by both."""

import errno
import os
from collections.abc import Callable
from contextlib import chdir, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities import rank_zero_only

from opdlab.cli import EXIT_USAGE, main
from tests.ranks.pair import Processes

FIT = [
    *("fit", "-c", "quickstart", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    *("--trainer.max_steps=1", "--data.benchmarks=null", "--model.sampling.max_new_tokens=4", "--export.enabled=false"),
]


def look_if_allowed(look: Callable[..., Any], path: Any, *args: Any, **options: Any) -> Any:
    if ".seen-" in str(path):
        raise PermissionError(errno.EACCES, "Permission denied")
    return look(path, *args, **options)


def fit_in(rank: int, places: list[Path], roots: list[str], denied: bool) -> tuple[int, str]:
    """Return exit code and messages of ``opdlab fit`` in a place of this process's own.

    Args:
        rank: of this process.
        places: working directories.
        roots: values of ``trainer.default_root_dir``.
        denied: the second process may not look into the folder of the first one's run.
    """
    rank_zero_only.rank = rank  # type: ignore[attr-defined] # Lightning was imported before the process had a rank
    said = StringIO()
    with chdir(places[rank]), redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        if denied and rank == 1:
            patch.setattr(os, "stat", partial(look_if_allowed, os.stat))
        return main([*FIT, "--trainer.devices=2", f"--trainer.default_root_dir={roots[rank]}"]), said.getvalue()


def fit_on_two_machines(rank: int, place: Path) -> tuple[int, str]:
    """Return exit code and messages of ``opdlab fit`` on a machine whose processes Lightning starts."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    os.environ["NODE_RANK"] = str(rank)
    rank_zero_only.rank = 0  # type: ignore[attr-defined] # what Lightning takes from this environment
    said = StringIO()
    with chdir(place), redirect_stderr(said):
        return main(
            [*FIT, "--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.default_root_dir=runs"]
        ), said.getvalue()


@pytest.mark.parametrize("cause", ["another working directory", "another value", "no right to look"])
def test_processes_that_do_not_see_one_folder_are_refused(pair: Processes, tmp_path: Path, cause: str) -> None:
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    roots = ["runs", "runs"] if cause == "another working directory" else [str(place / "runs") for place in places]
    if cause == "no right to look":
        roots[1] = roots[0]
    results = pair.run(fit_in, places, roots, cause == "no right to look")
    host, first = os.uname().nodename, places[0] / "runs/version_0"
    second = places[1] / "runs/version_0" if roots[1] != roots[0] or roots[0] == "runs" else first
    for code, said in results:
        assert code == EXIT_USAGE
        (line,) = (line for line in said.splitlines() if line.startswith("opdlab: "))
        assert line.startswith(
            f"opdlab: error: trainer.default_root_dir: process 1 on {host} does not see the folder "
            f"{first} of the first process, on {host}; its own is {second}: give a folder that all machines share"
        )
        assert "Traceback" not in said
    assert [list(place.iterdir()) for place in places] == [[], []]


def test_processes_that_see_one_folder_use_one(pair: Processes, tmp_path: Path) -> None:
    """Each is the first one of its machine; and no file is left behind by the check."""
    results = pair.run(fit_on_two_machines, tmp_path)
    assert [code for code, _ in results] == [0, 0], results
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]
    assert not list(tmp_path.rglob(".seen-*"))
