"""Shared parts of the benchmarks: child processes, pairwise ratios, facts of the machine, and the toy world.

The toy world is loaded by file path, so that a child without opdlab in its environment can use it too.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
TOY_MODELS = REPOSITORY / "opdlab" / "toy" / "models"


# -- processes -------------------------------------------------------------------------------------------------------


class ChildError(RuntimeError):
    """A child ended with an error, without a result, or too late; the message ends with the child's output."""


def run_child(
    script: Path,
    arguments: Sequence[str],
    *,
    threads: int,
    python: str = sys.executable,
    device: str = "cpu",
    timeout: float | None = None,
) -> dict[str, Any]:
    """Run ``script`` in a process of its own and return the JSON object that is its last line of output.

    Args:
        script: the Python file.
        arguments: its arguments.
        threads: for torch and its BLAS.
        python: the interpreter.
        device: of the measurement; for ``cpu`` accelerators are hidden.
        timeout: seconds after which the child is killed; None to wait for as long as it takes.

    Raises:
        ChildError: the child failed, printed nothing, or took too long.
    """
    environment = _environment(threads, device)
    command = [python, str(script), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        # On POSIX the output so far is bytes, whatever `text` says; None if there was none.
        written = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        raise ChildError(f"{' '.join(command)} was killed after {timeout:g} s:\n{written[-4000:]}") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise ChildError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def run_ranks(
    script: Path, arguments: Sequence[str], *, count: int, threads: int, device: str = "cpu", timeout: float
) -> dict[str, Any]:
    """Run ``script`` in processes that find each other by torch's variables, and return what the first one prints.

    Args:
        script: the Python file; the last line of the first process's output is a JSON object.
        arguments: its arguments.
        count: number of processes.
        threads: of each, for torch and its BLAS.
        device: see :func:`run_child`.
        timeout: seconds after which all are killed, as they are when one has failed.

    Raises:
        ChildError: a process failed, or all took too long.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", **_environment(threads, device)}
    command, children = [sys.executable, str(script), *arguments], []
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        try:
            for rank in range(count):
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                pipes = {"stdout": errors if rank else output, "stderr": errors}
                children.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))  # type: ignore[call-overload]
            codes = [child.poll() for child in children]
            while None in codes and not any(codes) and time.monotonic() < deadline:
                time.sleep(0.05)
                codes = [child.poll() for child in children]
        finally:
            for child in children:  # and what they have started
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        errors.seek(0)
        output.seek(0)
        lines, said = output.read().strip().splitlines(), errors.read()[-4000:]
    name = f"{count} processes of {' '.join(command)}"
    if None in codes and not any(codes):
        raise ChildError(f"{name} were killed after {timeout:g} s:\n{said}")
    if any(codes) or not lines:
        raise ChildError(f"{name} ended with {', '.join(map(str, codes))}:\n{said}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _environment(threads: int, device: str) -> dict[str, str]:
    """Return the environment of a child."""
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *inherited]),
    }
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


class PeakMemory:
    """Peak memory of this process after construction, bytes; of an accelerator if one is given.

    For the process it is the resident set as counted by Linux.

    Args:
        device: a CUDA device, or None.
    """

    def __init__(self, device: Any = None) -> None:
        self._device = device
        if device is None:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self._before = _resident("VmRSS")
        else:
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            self._before = float(torch.cuda.memory_allocated(device))

    def peak_bytes(self) -> float:
        """Return the peak since then, including the memory held before."""
        return self._before + self.extra_bytes()

    def now_bytes(self) -> float:
        """Return the process's memory now, above the memory held before; not of a device."""
        return _resident("VmRSS") - self._before

    def extra_bytes(self) -> float:
        """Return the peak since then, above the memory held before."""
        if self._device is None:
            return _resident("VmHWM") - self._before
        import torch

        return float(torch.cuda.max_memory_allocated(self._device)) - self._before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def machine() -> dict[str, Any]:
    """Return facts of the machine and its load before the measurement."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores, "system": platform.platform(), "load_average": os.getloadavg()[0]}


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of the packages of this interpreter."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# -- time ------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up the time of calls by name, while it is switched on.

    Args:
        on: initial state.
    """

    def __init__(self, on: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.on = on

    def add(self, name: str, seconds: float) -> None:
        """Count ``seconds``."""
        if self.on:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.add(name, time.perf_counter() - began)

        return timed


# -- metrics ---------------------------------------------------------------------------------------------------------


def median(values: Iterable[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def pairwise_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return ``ours / theirs`` round by round, since a slow phase of the machine affects both."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median, with the smallest and the largest in brackets."""
    if not values:
        return "-"
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


# -- the toy world ---------------------------------------------------------------------------------------------------


def _load(name: str, path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def toy_problems(split: str, count: int) -> list[tuple[str, str]]:
    """Return prompts and answers: the first of the stream that the configurations use too."""
    chains = _load("opdlab_benchmark_chain", REPOSITORY / "opdlab" / "toy" / "chain.py").chain_problems(split, seed=0)
    return [(chain.prompt, chain.answer) for chain, _ in zip(chains, range(count), strict=False)]


class ToyEvaluation:
    """pass@1 on held-out toy problems; the global random generators keep their state.

    Args:
        num_problems: number of problems.
        num_samples: answers to each.
        max_new_tokens: longest answer.
    """

    def __init__(self, num_problems: int = 64, num_samples: int = 8, max_new_tokens: int = 176) -> None:
        module = _load("opdlab_benchmark_verifier", REPOSITORY / "opdlab" / "verifiers" / "verifier.py")
        self._verifier = module.BoxedVerifier(at_end=True)
        self._problems = toy_problems("held_out", num_problems)
        self._num_samples, self._max_new_tokens = num_samples, max_new_tokens

    def __call__(self, model: Any, tokenizer: Any, seed: int = 0) -> float:
        """Sample and check answers.

        Args:
            model: a Hugging Face causal language model.
            tokenizer: its tokenizer.
            seed: of the sampling.
        """
        import torch
        from transformers import GenerationConfig

        prompts = [prompt for prompt, _ in self._problems for _ in range(self._num_samples)]
        golds = [answer for _, answer in self._problems for _ in range(self._num_samples)]
        config = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=self._max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        training, own = model.training, model.generation_config
        model.eval()
        model.generation_config = config
        python_state = random.getstate()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                tokens = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
        finally:
            model.train(training)
            model.generation_config = own
            random.setstate(python_state)
        answers = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        verdicts = self._verifier.verify(answers, golds)
        num_correct: int = sum(verdict.correct for verdict in verdicts)
        return num_correct / len(verdicts)
