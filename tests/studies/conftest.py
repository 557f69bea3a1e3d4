"""A finished study, which all processes of the suite share; nobody changes it."""

import fcntl
import os
import sys
from pathlib import Path

import pytest

from tests.studies.tiny import study_run, write


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds ``tiny.yaml`` and ``runs/studies/tiny``, every run finished; copy it before a change."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder, done = shared / "finished-study", shared / "finished-study.done"
    with (shared / "finished-study.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it
        if not done.exists():
            folder.mkdir()
            with pytest.MonkeyPatch.context() as monkeypatch:
                before = list(sys.argv)
                assert study_run(monkeypatch, write(folder)) == 0
                assert sys.argv == ["opdlab"] != before
            done.touch()
    return folder
