"""Shared parts of the programs that ``step.py`` compares: the settings, the clock, and the results.

This module must not import opdlab: TRL runs in an environment that may lack it.
"""

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import TOY_MODELS, Stopwatch, ToyEvaluation, toy_problems

BLOCK = 64  # tokens of a gate's block
TAU = 1.0
SUPPORT = 32  # K of LSM
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
WARM_UP_STEPS = 10
WARM_UP_FROM = 0.1
CLIP_NORM = 1.0
EVALUATE_EVERY = 5  # steps
LOG_EVERY = 10  # steps; TRL's default; TRL is the only other program that logs
PARTS = ("sample", "teacher", "update")

# Its mean probability in the student's responses is 7e-9, the smallest of all special tokens. See `endless`.
_NEVER_SAMPLED = "<filename>"
_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


# -- what is trained ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A pair of models, prompts and sizes.

    Args:
        models: folder that holds the folders ``student`` and ``teacher``, if none is given.
        num_prompts: distinct prompts.
        prompts_per_pool: of a buffer, for the programs that reuse rollouts.
        samples_per_prompt: rollouts of each prompt.
        batch_size: rollouts per optimizer step.
        max_new_tokens: longest response.
        learning_rate: of AdamW.
        steps: optimizer steps of a run, by default.
        fixed_length: every response has ``max_new_tokens`` tokens, so that all programs train on equally many.
        reuse_epochs: passes over a buffer.
    """

    models: Path
    num_prompts: int
    prompts_per_pool: int
    samples_per_prompt: int
    batch_size: int
    max_new_tokens: int
    learning_rate: float
    steps: int
    fixed_length: bool
    reuse_epochs: int = 4

    @property
    def steps_per_pool(self) -> int:
        """Return the optimizer steps until a buffer is used up."""
        return self.reuse_epochs * self.prompts_per_pool * self.samples_per_prompt // self.batch_size

    def prompts(self) -> list[str]:
        """Return the prompt texts, ready to be tokenized."""
        if self.fixed_length:
            return [_CHAT.format(question) for question in _word_problems(self.num_prompts)]
        return [prompt for prompt, _ in toy_problems("train", self.num_prompts)]


CASES = {
    # The quickstart's settings.
    "toy": Case(
        models=TOY_MODELS,
        num_prompts=2048,
        prompts_per_pool=32,
        samples_per_prompt=2,
        batch_size=32,
        max_new_tokens=176,
        learning_rate=2e-4,
        steps=40,
        fixed_length=False,
    ),
    # The output of `make_smollm2_pair.py models/smollm2`; sized for two cores.
    "smollm2": Case(
        models=Path("models/smollm2"),
        num_prompts=256,
        prompts_per_pool=8,
        samples_per_prompt=2,
        batch_size=8,
        max_new_tokens=64,
        learning_rate=1e-4,
        steps=8,
        fixed_length=True,
    ),
}


def _word_problems(count: int) -> list[str]:
    """Return short questions, all different."""
    dice = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        name, thing = dice.choice(("Ada", "Ben", "Cleo", "Dan", "Eve")), dice.choice(("apples", "books", "coins"))
        have, bags, each, gone = dice.randint(11, 60), dice.randint(2, 9), dice.randint(3, 15), dice.randint(1, 10)
        found[
            f"{name} has {have} {thing} and buys {bags} boxes of {each} {thing} each, then gives {gone} {thing} away. "
            f"How many {thing} does {name} have left? Reason step by step."
        ] = None
    return list(found)


@contextmanager
def endless(models: Path) -> Iterator[Path]:
    """Return the pair with a stop token that is never sampled, so that responses always have the full length.

    All programs get the same folders: the former stop token is an ordinary token for each of them, and no program needs
    an extra option. Weights are linked, not copied.
    """
    with TemporaryDirectory() as folder:
        for name in ("student", "teacher"):
            source, copy = (models / name).resolve(), Path(folder, name)
            copy.mkdir()
            for file in source.iterdir():
                (copy / file.name).symlink_to(file)
            _set_stop_token(copy)
        yield Path(folder)


def _set_stop_token(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    stop_id = next(token["id"] for token in added if token["content"] == _NEVER_SAMPLED)
    values = {
        "config.json": {"eos_token_id": stop_id},
        "generation_config.json": {"eos_token_id": stop_id},
        "tokenizer_config.json": {"eos_token": _NEVER_SAMPLED},
    }
    for name, changed in values.items():
        file = folder / name
        text = json.dumps(json.loads(file.read_text(encoding="utf-8")) | changed)
        file.unlink()  # remove the link, not its target
        file.write_text(text, encoding="utf-8")


# -- a run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Task of a child.

    Args:
        case: name of a :class:`Case`.
        models: folder that holds the folders ``student`` and ``teacher``.
        steps: optimizer steps, at most.
        seed: of prompts, order and samples.
        target: stop at this pass@1, evaluating on the way; None trains for ``steps`` without evaluating.
    """

    case: str
    models: Path
    steps: int
    seed: int
    target: float | None = None

    @property
    def sizes(self) -> Case:
        """Return the case."""
        return CASES[self.case]

    @property
    def log_every(self) -> int:
        """Return the steps between logged steps; a short run is logged once."""
        return min(LOG_EVERY, self.steps)

    @property
    def student(self) -> str:
        """Return the folder of the student."""
        return str(self.models / "student")

    @property
    def teacher(self) -> str:
        """Return the folder of the teacher."""
        return str(self.models / "teacher")


class Clock:
    """Wall and processor seconds of a run and of its steps alone, paused during evaluations."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0
        self.steps_wall = self.steps_processor = 0.0
        self._since: tuple[float, float] | None = None
        self._first_step = 0.0, 0.0

    def start(self) -> None:
        """Start or continue."""
        self._since = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Pause."""
        assert self._since is not None
        self.wall += time.perf_counter() - self._since[0]
        self.processor += time.process_time() - self._since[1]
        self._since = None

    def read(self) -> tuple[float, float]:
        """Return wall and processor seconds so far."""
        if self._since is None:
            return self.wall, self.processor
        now = time.perf_counter(), time.process_time()
        return self.wall + now[0] - self._since[0], self.processor + now[1] - self._since[1]

    def begin_steps(self) -> None:
        """Mark the end of the setup and the start of the steps."""
        self._first_step = self.read()

    def end_steps(self) -> None:
        """Mark the end of the steps so far; later time does not count as theirs, unless this is called again."""
        wall, processor = self.read()
        self.steps_wall, self.steps_processor = wall - self._first_step[0], processor - self._first_step[1]


@dataclass
class Run:
    """A training run with its clock.

    Args:
        task: of the run.
        clock: on while the program trains.
        parts: seconds of each of ``PARTS``.
        tokens: response tokens sampled and trained on; the teacher scores each sampled token once.
        history: step, seconds of training so far and pass@1 of each evaluation.
        reached: True if the target was reached.
    """

    task: Task
    clock: Clock = field(default_factory=Clock)
    parts: Stopwatch = field(default_factory=lambda: Stopwatch(on=True))
    tokens: dict[str, float] = field(default_factory=lambda: {"sampled": 0, "trained": 0})
    history: list[tuple[int, float, float]] = field(default_factory=list)
    reached: bool = False

    def __post_init__(self) -> None:
        evaluated = self.task.target is not None
        self._evaluate = ToyEvaluation(max_new_tokens=self.task.sizes.max_new_tokens) if evaluated else None

    def after_step(self, step: int, model: Any, tokenizer: Any) -> bool:
        """Evaluate if it is due, with the clock stopped; return True if training should stop."""
        if self._evaluate is None or (step % EVALUATE_EVERY and step != self.task.steps):
            return False
        self.clock.stop()
        self.parts.on = False
        accuracy = self._evaluate(model, tokenizer)
        self.history.append((step, self.clock.wall, accuracy))
        self.reached = accuracy >= (self.task.target or 0)
        self.parts.on = True
        self.clock.start()
        return self.reached

    def result(self, steps: int) -> dict[str, Any]:
        """Return the child's result after ``steps`` optimizer steps."""
        trained, clock = self.tokens["trained"], self.clock
        return {
            "steps": steps,
            "seconds": clock.wall,
            "seconds_per_step": clock.steps_wall / steps,
            "processor_seconds_per_step": clock.steps_processor / steps,
            "run_seconds_per_step": clock.wall / steps,
            "seconds_outside_steps": clock.wall - clock.steps_wall,
            "trained_tokens": trained,
            "sampled_tokens": self.tokens["sampled"],
            "trained_tokens_per_second": trained / clock.steps_wall,
            "milliseconds_per_1000_tokens": 1e6 * clock.steps_wall / trained,
            **{f"{part}_seconds": self.parts.seconds.get(part, 0.0) for part in PARTS},
            "history": self.history,
            "reached": self.reached,
        }
