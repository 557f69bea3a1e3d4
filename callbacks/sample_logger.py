"""Rollouts of a training step as text for loggers, and as a page with coloured tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlab.callbacks.step_callback import StepCallback
from opdlab.data.datamodule import PromptDataModule
from opdlab.diagnostics import StepTrace
from opdlab.errors import require
from opdlab.loggers import log_media
from opdlab.module import OPDModule
from opdlab.types import Problem
from opdlab.viewer import (
    INDEX,
    RolloutText,
    ShownRollout,
    choose_rollouts,
    drop_pages_after,
    markdown_literal,
    render_page,
    token_texts,
    visible,
    write_page,
)

_SHOWN = 200  # characters of the options of a gate or objective, which may list tokens
_VERDICTS = {None: "unchecked", True: "correct", False: "wrong"}


class SampleLogger(StepCallback):
    """Writes some rollouts of every n-th optimizer step as text to the loggers and as a page with coloured tokens.

    The rollouts are those at evenly spaced ranks of mean absolute drift, from the most drifted to the least, see
    :func:`opdlab.viewer.choose_rollouts`; the step has used them, and nothing is sampled or scored again. Loggers
    have them as ``rollouts/0``, ``rollouts/1``, …; the page is ``rollouts/step-000200.html`` in the run's folder, or in
    ``default_root_dir`` without a logger, beside an ``index.html``. Of a long run 64 pages stay, spread over its steps.
    Only the first process writes, of its own rollouts. If a page cannot be written, there is one warning and training
    continues.

    Args:
        every_n_steps: optimizer steps between pages, at least 1.
        num_rollouts: rollouts on a page, at least 1.

    Raises:
        UsageError: a value is below 1.

    Example:
        >>> SampleLogger(every_n_steps=50).num_rollouts
        4
    """

    def __init__(self, every_n_steps: int = 100, num_rollouts: int = 4) -> None:
        super().__init__(every_n_steps)
        require(num_rollouts >= 1, f"num_rollouts is {num_rollouts}, but must be at least 1")
        self.num_rollouts = num_rollouts
        self.folder = Path()
        """Folder of the pages, set when training starts."""
        self._warned = False

    @property
    def index(self) -> Path:
        """Return the path of the page that lists the others."""
        return self.folder / INDEX

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the run's folder; Lightning exchanges it between all processes."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "rollouts"
        if trainer.is_global_zero and trainer.ckpt_path is not None:
            with self._warning_once():
                drop_pages_after(self.folder, trainer.global_step)

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, traces: Sequence[StepTrace]) -> None:
        """Write text and page."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, OPDModule)
        rollouts = choose_rollouts(traces, self.num_rollouts)
        if not rollouts:  # the loss may leave out every token of the step
            return
        texts = rollout_texts(trainer, pl_module.student.tokenizer, rollouts)
        marked = [rollout_markdown(*pair) for pair in zip(rollouts, texts, strict=True)]
        shown = {f"rollouts/{place}": text for place, text in enumerate(marked)}
        log_media(trainer.loggers, trainer.global_step, texts=shown)
        with self._warning_once():
            write_rollout_page(self.folder, trainer, pl_module, rollouts, texts)

    @contextmanager
    def _warning_once(self) -> Iterator[None]:
        """Go on with a warning, the first time, if the pages cannot be written."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                rank_zero_warn(
                    f"{self.folder} cannot be written ({error.strerror or error}): pages of rollouts are left out "
                    "until it can be; training goes on"
                )
            self._warned = True


def rollout_texts(
    trainer: pl.Trainer, tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[ShownRollout]
) -> list[RolloutText]:
    """Return the text of each rollout.

    Args:
        trainer: of the run; its data module knows the problems.
        tokenizer: the student's.
        rollouts: with their token ids.
    """
    data = trainer.datamodule  # type: ignore[attr-defined] # set by Lightning's data connector
    prompts = data.train_prompts.prompts if isinstance(data, PromptDataModule) and data.train_prompts else ()
    special = set(tokenizer.all_special_ids)

    def problem(index: int) -> Problem | None:
        try:
            return prompts[index].problem
        except IndexError:  # of a pack, or of an earlier window of a stream
            return None

    def text(tokens: Tensor) -> str:
        return str(tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False))

    return [
        RolloutText(
            prompt=text(rollout.prompt_tokens),
            tokens=token_texts(tokenizer, tokens := rollout.tokens.tolist()),
            special=[token in special for token in tokens],
            problem=problem(rollout.prompt_id),
            teacher_prompt=None if (seen := rollout.teacher_prompt_tokens) is None else text(seen),
        )
        for rollout in rollouts
    ]


def write_rollout_page(
    folder: Path,
    trainer: pl.Trainer,
    module: OPDModule,
    rollouts: Sequence[ShownRollout],
    texts: Sequence[RolloutText],
    **facts: str,
) -> Path:
    """Write the page of the current step, and return its path.

    Args:
        folder: of the run's pages.
        trainer: of the run.
        module: of the run; its gate and objective are in the head of the page.
        rollouts: shown on the page.
        texts: of each.
        facts: further ones for the head of the page, by name.

    Raises:
        OSError: the folder cannot be written.
    """
    parts = {name: visible(repr(part)) for name, part in (("gate", module.gate), ("objective", module.objective))}
    shown = {name: text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…" for name, text in parts.items()}
    if trainer.world_size > 1:
        shown["rollouts"] = f"of the first of {trainer.world_size} processes"
    page = render_page(trainer.global_step, rollouts, texts, {**shown, **facts})
    return write_page(folder, trainer.global_step, page)


def rollout_markdown(rollout: ShownRollout, text: RolloutText) -> str:
    """Return Markdown for a rollout: text of models and data is in code blocks, which have no markup.

    Args:
        rollout: its values.
        text: its text.
    """
    facts = {
        "answer": _VERDICTS[rollout.correct],
        "stopped by": rollout.stop_reason.name.lower(),
        "age": f"{rollout.age} step{'s' * (rollout.age != 1)}",
        "reuse epoch": str(rollout.reuse_epoch),
        "length": f"{len(rollout.tokens)} token{'s' * (len(rollout.tokens) != 1)}",
        "mean abs(drift)": f"{rollout.mean_drift:.3g} nats",
        "drift rank": f"{rollout.rank + 1} of {rollout.num_ranked}",
        "rollout": str(rollout.rollout_id),
    }
    if rollout.demonstration:
        facts["response"] = "from the data"
    blocks = {"prompt": text.prompt, "response": "".join(text.tokens)}
    if text.teacher_prompt is not None:
        blocks["prompt that the teacher sees"] = text.teacher_prompt
    if text.problem is not None and text.problem.answer is not None:
        blocks["gold answer"] = text.problem.answer
    head = " · ".join(f"{name}: **{value}**" for name, value in facts.items())
    return "\n\n".join([head, *(f"**{name}**\n\n{markdown_literal(block)}" for name, block in blocks.items())])
