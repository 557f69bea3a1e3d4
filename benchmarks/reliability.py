"""Kill runs at random moments, let them go on, and compare what they leave with an uninterrupted run.

Each run is killed several times (SIGKILL): at uniform moments, and aimed at the writing of a checkpoint, at sampling,
at scoring, at a step, at a validation with its sample lines, and at the export. After a kill it is started again, with
``--ckpt_path last`` once there is a checkpoint. Compared are weights and optimizer state of the last checkpoint, the
exported student, sample lines, ``metrics.csv``, the curves in the event files and ``results.json``, all but times.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opdlab.checkpoints import newest_checkpoint, tree_digest
from opdlab.cli import main as opdlab

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {
    "trainer": {
        "max_steps": 10,
        "val_check_interval": 4,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "model": {
        "sampling": {"max_new_tokens": 24},
        "eval_sampling": {"num_samples": 2, "max_new_tokens": 24, "batch_size": 8},
        "evaluation": {"pass_at": [1, 2]},
    },
    "data": {
        "train": {"class_path": "opdlab.toy.ChainProblems", "init_args": {"num_problems": 16}},
        "benchmarks": {
            "toy": {"class_path": "opdlab.toy.ChainProblems", "init_args": {"num_problems": 8, "split": "held_out"}}
        },
        "reuse": {"prompts_per_pool": 4, "epochs": 2, "batch_size": 4},
        "eval_batch_size": 2,
    },
    "checkpoint": {"every_n_train_steps": 1, "save_last": True},
    "gate_monitor": {"every_n_steps": 2},
    "sample_logger": {"every_n_steps": 3},
}
CASES: dict[str, list[str]] = {
    "plain": [],
    "accumulation": ["--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=16"],
    "LoRA": ["--model.student.init_args.adapter.r=4"],
    "two processes": ["--trainer.devices=2"],
}
PLACES = {  # hook or bar: the largest number of the call, and the seconds after it within which the kill comes
    "setup": (2, 0.3),
    "on_save_checkpoint": (4, 0.08),
    "sampling": (20, 0.05),
    "scoring (teacher)": (2, 0.02),
    "on_train_batch_start": (4, 0.05),
    "on_validation_batch_start": (4, 0.05),
    "on_validation_end": (2, 0.05),
    "on_fit_end": (1, 0.1),
}
TIMED = re.compile("time/|seconds|per_second")


class Killer(Callback):
    """Kills its process, and those that it has started, some time after the n-th call of a hook or unit of a bar.

    Args:
        place: name of the hook or bar.
        count: n.
        delay: seconds.
        log: file that the place is added to when it is time.
    """

    def __init__(self, place: str, count: int, delay: float, log: str) -> None:
        self.place, self.left, self.delay, self.kills = place, count, delay, Path(log)
        if hasattr(Callback, place):
            setattr(self, place, self.tick)

    def tick(self, *arguments: Any, **options: Any) -> None:
        """Count, and start the clock when it is time."""
        self.left -= 1
        if self.left == 0 and os.environ.get("LOCAL_RANK", "0") == "0":
            threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        time.sleep(self.delay)
        with self.kills.open("a") as file:
            file.write(f"{self.place}\n")
        os.killpg(os.getpgid(0), signal.SIGKILL)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """See :class:`opdlab.progress.Progress`."""
        yield lambda _: self.tick() if name == self.place else None


def attempt(arguments: list[str], folder: Path, processes: int) -> int:
    """Run ``opdlab fit`` in a process group of its own; return its exit code, -n after signal n."""
    output = (folder / "output.txt").open("ab", buffering=0)
    if processes > 1:  # Lightning starts the others with the command line of this process
        command = [sys.executable, "-m", "opdlab", "fit", *arguments]
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"}
        return subprocess.run(
            command, stdout=output, stderr=output, env=environment, process_group=0, check=False
        ).returncode
    if (child := os.fork()) == 0:  # has imported everything
        os.setpgid(0, 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        code = 1
        try:
            code = opdlab(["fit", *arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    output.close()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left_behind(run: Path) -> dict[str, Any]:
    """Return what a run has left, without times."""
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    checkpoint = torch.load(found[0], weights_only=True)
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    results = json.loads((run / "results.json").read_text())
    return {
        "weights": tree_digest(checkpoint["state_dict"]),
        "optimizer": tree_digest([checkpoint["optimizer_states"], checkpoint["lr_schedulers"]]),
        "student": {path.name: path.read_bytes() for path in sorted((run / "student").glob("*.safetensors"))},
        "sample lines": {str(path.relative_to(run)): path.read_bytes() for path in run.glob("evaluations/*/*.jsonl")},
        "metrics.csv": [{name: x for name, x in row.items() if x and not TIMED.search(name)} for row in rows],
        "event curves": curves(run),
        "results.json": {name: x for name, x in results.items() if not TIMED.search(name)},
    }


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars in a run's event files, by name."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if not TIMED.search(name)]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in sorted(names)}


def killed_run(
    case: str, arguments: list[str], root: Path, kills: int, length: float, draw: random.Random
) -> Counter[str]:
    """Run until the end, with up to ``kills`` kills on the way; return their places."""
    processes = 2 if "two" in case else 1
    log = root / "kills.txt"
    root.mkdir()
    log.touch()
    for _ in range(3 * kills):
        done = len(log.read_text().split("\n")) - 1
        place = draw.choice(list(PLACES))
        count, delay = draw.randint(1, PLACES[place][0]), draw.uniform(0, PLACES[place][1])
        if draw.random() < 0.25:
            place, count, delay = "setup", 1, draw.uniform(0, length)  # at a uniform moment
        flag = "--trainer.callbacks"
        values = {"place": place, "count": count, "delay": delay, "log": str(log)}
        aimed = [f"{flag}+=reliability.Killer", *(f"{flag}.{key}={value}" for key, value in values.items())]
        resumed = ["--ckpt_path", "last"] if any(root.glob("version_*/checkpoints/*.ckpt")) else []
        code = attempt([*arguments, *(aimed if done < kills else []), *resumed], root, processes)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{root}: exit code {code}: {(root / 'output.txt').read_text()[-3000:]}")
        partial = list(root.rglob("*.partial"))
        if len(partial) > 1:
            raise RuntimeError(f"{root}: {partial}")
    return Counter(log.read_text().split("\n")[:-1])


def measure(options: argparse.Namespace, folder: Path) -> int:
    """Print a table with a row for each case, and return the number of runs that differ."""
    (folder / "small.yaml").write_text(yaml.dump(SMALL))
    draw, places, differing = random.Random(options.seed), Counter[str](), 0
    print("| case | runs | kills | equal | differs in |\n|---|---|---|---|---|", flush=True)
    for case in options.cases:
        common = ["-c", "quickstart", "-c", str(folder / "small.yaml"), *CASES[case]]
        whole_root = folder / f"{case}-whole".replace(" ", "-")
        whole_root.mkdir()
        started = time.monotonic()
        root_flag = f"--trainer.default_root_dir={whole_root}"
        code = attempt([*common, root_flag], whole_root, 2 if "two" in case else 1)
        if code != 0:
            raise RuntimeError(f"{case}: exit code {code}: {(whole_root / 'output.txt').read_text()[-3000:]}")
        length, whole = time.monotonic() - started, left_behind(whole_root / "version_0")
        kills, equal, differs = 0, 0, Counter[str]()
        for number in range(options.runs):
            root = folder / f"{case}-{number}".replace(" ", "-")
            root_flag = f"--trainer.default_root_dir={root}"
            at = killed_run(case, [*common, root_flag], root, options.kills, length, draw)
            newest = max(root.glob("version_*"), key=lambda path: int(path.name[8:]))
            left = left_behind(newest)
            different = [name for name in whole if left[name] != whole[name]]
            places, kills, equal = places + at, kills + sum(at.values()), equal + (not different)
            differs.update(different)
            if not different and not options.keep:
                shutil.rmtree(root)
        differing += options.runs - equal
        shown = ", ".join(f"{name} ({count})" for name, count in differs.items()) or "nothing"
        print(f"| {case} | {options.runs} | {kills} | {equal} | {shown} |", flush=True)
    print(f"\n{sum(places.values())} kills: " + ", ".join(f"{name} {count}" for name, count in places.most_common()))
    return differing


def main() -> int:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4, help="runs of each case")
    parser.add_argument("--kills", type=int, default=4, help="kills of each run, at most")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, help="folder for the runs; by default only those that differ are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.modules["reliability"] = sys.modules["__main__"]  # the class path of the callback
    folder = options.keep or Path(tempfile.mkdtemp(prefix="reliability-"))
    folder.mkdir(parents=True, exist_ok=True)
    differing = measure(options, folder.resolve())
    if differing:
        print(f"{differing} runs differ: see {folder}")
    elif options.keep is None:
        shutil.rmtree(folder)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
