"""Checkpoints are whole or not there, what is read is what was written, and `last` is the newest sound one."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from opdlab.callbacks import StopCheckpoint
from opdlab.checkpoints import CheckpointFiles, check_checkpoint, find_checkpoint, read_checkpoint
from opdlab.errors import FullDiskError, UsageError
from opdlab.files import full_disk, remove_partial_files
from tests.toy_run import Run

MakeRun = Callable[..., Run]


@pytest.fixture
def written(make_run: MakeRun, tmp_path: Path) -> Path:
    """A checkpoint after the third step of a run."""
    folder = tmp_path / "version_0" / "checkpoints"
    run = make_run(callbacks=(StopCheckpoint(str(folder)),))
    run.trainer_options["enable_checkpointing"] = True
    run.fit(3)
    return folder / "final.ckpt"


def changed(path: Path, name: str, **values: Any) -> Path:
    """Write a checkpoint beside ``path`` without a digest, with some keys replaced, or left out if they are None."""
    content = read_checkpoint(path) | values
    content = {key: value for key, value in content.items() if value is not None}
    torch.save(content, path.with_name(name))
    return path.with_name(name)


def test_each_flipped_bit_of_a_tensor_is_found(written: Path, tmp_path: Path) -> None:
    assert check_checkpoint(written) == 3
    content, damaged = written.read_bytes(), tmp_path / "damaged.ckpt"
    with zipfile.ZipFile(written) as archive:
        tensors = [item for item in archive.infolist() if "/data/" in item.filename and item.file_size]
    assert len(tensors) > 30
    for item in tensors[::5]:
        bytes_, start = bytearray(content), item.header_offset
        names = sum(int.from_bytes(content[start + at : start + at + 2], "little") for at in (26, 28))
        bytes_[start + 30 + names + item.file_size // 2] ^= 0x10
        damaged.write_bytes(bytes_)
        torch.load(damaged, weights_only=True)  # torch itself reads it without a word
        with pytest.raises(UsageError, match="its digest differs"):
            check_checkpoint(damaged)
        with pytest.raises(UsageError, match="its digest differs"):
            CheckpointFiles().load_checkpoint(damaged)


def test_a_checkpoint_without_a_digest_is_read_with_a_warning(written: Path) -> None:
    older = changed(written, "older.ckpt")
    with pytest.warns(UserWarning, match=r"older\.ckpt has no digest"):
        assert check_checkpoint(older) == 3


def test_what_cannot_be_resumed_is_one_line(written: Path, tmp_path: Path) -> None:
    loops = read_checkpoint(written)["loops"]
    loops["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] = "three"
    broken = {
        "holds no state_dict": changed(written, "a.ckpt", state_dict=None),
        "no optimizer state": changed(written, "b.ckpt", optimizer_states=None),
        "holds weights but no optimizer": changed(written, "c.ckpt", optimizer_states=[]),
        "its global_step is 'many', but must be an integer": changed(written, "d.ckpt", global_step="many"),
        "its lr_schedulers is missing": changed(written, "e.ckpt", lr_schedulers=None),
        "total.ready is 'three', but must be a number": changed(written, "f.ckpt", loops=loops),
        "opdlab did not write": changed(written, "g.ckpt", opdlab=None),
        "is a folder": written.parent,
    }
    for name, content in {"empty": {}, "list": [1, 2]}.items():
        torch.save(content, tmp_path / f"{name}.ckpt")
    broken |= {"no state_dict of tensors": tmp_path / "empty.ckpt", "no checkpoint, but a list": tmp_path / "list.ckpt"}
    (tmp_path / "config.yaml").write_text("model:\n  gate: block64\n")
    broken["it is no checkpoint"] = tmp_path / "config.yaml"
    torch.save({"state_dict": Path()}, tmp_path / "code.ckpt")
    broken["more than tensors and plain values"] = tmp_path / "code.ckpt"
    for words, path in broken.items():
        with pytest.raises(UsageError, match=words) as raised:
            check_checkpoint(path)
        assert "\n" not in str(raised.value)
        assert str(path) in str(raised.value)
    with pytest.warns(UserWarning, match="no digest"):  # weights suffice for an evaluation
        assert check_checkpoint(broken["no optimizer state"], resume=False) == 3


def test_last_is_the_sound_one_with_the_most_steps_of_the_highest_version(written: Path, tmp_path: Path) -> None:
    root = tmp_path
    for number, names in {2: ("step-9", "step-10"), 10: ("cut",), 11: ()}.items():
        folder = root / f"version_{number}" / "checkpoints"
        folder.mkdir(parents=True)
        for name in names:
            files = CheckpointFiles()
            files.save_checkpoint(
                read_checkpoint(written) | {"global_step": int(name[5:] or 0)}, folder / f"{name}.ckpt"
            )
    cut = root / "version_10/checkpoints/cut.ckpt"
    cut.write_bytes(cut.read_bytes()[:1000])
    (root / "version_11/checkpoints").mkdir(exist_ok=True)
    (root / "version_11/checkpoints/step-50.ckpt.partial").write_bytes(written.read_bytes())
    os.utime(root / "version_2/checkpoints/step-9.ckpt", (2e9, 2e9))  # copied later, but of an earlier step
    with pytest.warns(UserWarning, match=r"skips what is not sound: '.*cut\.ckpt' cannot be read"):
        assert find_checkpoint("last", root) == root / "version_2/checkpoints/step-10.ckpt"
    newest = root / "version_2/checkpoints/step-10.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"cut\.ckpt.*step-10\.ckpt' is not as it was written"):
        assert find_checkpoint("last", root) == root / "version_2/checkpoints/step-9.ckpt"
    (root / "version_0/checkpoints/dangling.ckpt").symlink_to("nowhere.ckpt")  # the link of save_last: link
    shutil.rmtree(root / "version_2")
    with pytest.warns(UserWarning, match=r"cut\.ckpt"):
        assert find_checkpoint("last", root) == written


KILLED = """
import sys, torch
from pathlib import Path
from opdlab.checkpoints import CheckpointFiles
path, size = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    CheckpointFiles().save_checkpoint({"weights": torch.ones(size)}, path)
"""


def test_a_kill_leaves_the_old_checkpoint_and_at_most_one_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "last.ckpt"
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    CheckpointFiles().save_checkpoint({"weights": torch.zeros(3)}, path)
    for attempt in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(5_000_000)],
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(elsewhere)},
        )
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.02 + 0.05 * attempt)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert float(read_checkpoint(path)["weights"].sum()) in (0, 5_000_000)
        names = {file.name for file in path.parent.iterdir()}
        assert names <= {"last.ckpt", "last.ckpt.partial"}
        assert list(elsewhere.iterdir()) == []
    remove_partial_files(path.parent)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_errors_that_name_each_other_as_their_reason_are_looked_at_once() -> None:
    """A writer's thread keeps its error and raises it again, also while what was raised from it is handled."""
    first, second = OSError(errno.ENOSPC, "No space left on device", "events"), RuntimeError("cannot be written")
    first.__context__, second.__cause__ = second, first
    assert full_disk(first) == full_disk(second) == Path("events")


def test_a_full_disk_keeps_the_old_checkpoint(small_disk: Path) -> None:
    path = small_disk / "last.ckpt"
    files = CheckpointFiles()
    files.save_checkpoint({"weights": torch.zeros(500_000)}, path)
    with pytest.raises(FullDiskError, match=r"last\.ckpt cannot be written, because the disk is full"):
        files.save_checkpoint({"weights": torch.ones(600_000)}, path)
    assert float(files.load_checkpoint(path)["weights"].sum()) == 0
    assert [file.name for file in small_disk.iterdir()] == ["last.ckpt"]


def test_all_checkpoints_of_a_run_are_written_so(make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    regular = ModelCheckpoint(folder, filename="step-{step}", every_n_train_steps=2, save_last=True, save_top_k=-1)
    run = make_run(callbacks=(regular, StopCheckpoint(str(folder))))
    run.trainer_options["enable_checkpointing"] = True
    trainer: pl.Trainer = run.fit(3)
    assert isinstance(trainer.strategy.checkpoint_io, CheckpointFiles)
    names = {path.name: check_checkpoint(path) for path in folder.iterdir()}
    assert names == {"step-step=2.ckpt": 2, "last.ckpt": 2, "final.ckpt": 3}


def test_whatever_part_of_a_checkpoint_is_at_fault_is_one_line(make_run: MakeRun, written: Path) -> None:
    states = read_checkpoint(written)["optimizer_states"]
    states[0]["param_groups"] = "text"
    broken = changed(written, "broken.ckpt", optimizer_states=states)
    run = make_run(callbacks=(StopCheckpoint(str(written.parent)),))
    run.trainer_options["enable_checkpointing"] = True
    with (
        pytest.warns(UserWarning, match="no digest"),
        pytest.raises(UsageError, match=r"broken\.ckpt' cannot be restored \(\w+: .*\): resume with the configuration"),
    ):
        run.fit(4, ckpt_path=broken)
