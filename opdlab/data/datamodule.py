"""The data module: prompts for training, problems for evaluation."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from opdlab.data.cleaning import CleaningConfig, CleaningReport, asked_text, clean
from opdlab.data.facts import PromptFacts
from opdlab.data.prompts import ProblemSource, PromptSet, prompt_set
from opdlab.data.streams import StreamedPrompts, streamed_prompts
from opdlab.data.templates import Template
from opdlab.errors import UsageError, require
from opdlab.policies.context import ContextLength
from opdlab.policies.routed_teacher import check_teacher
from opdlab.rollouts import DemonstrationConfig, Pool, ReuseConfig, RolloutLoader
from opdlab.rollouts.demonstrations import MEND
from opdlab.seeds import DEFAULT_SEED, checked_seed
from opdlab.types import EvaluationBatch, Prompt
from opdlab.verifiers.verifier import Verifier


class PromptDataModule(pl.LightningDataModule):
    """Data module with training prompts and evaluation benchmarks.

    Args:
        train: problems to sample rollouts for.
        benchmarks: problems to evaluate on, by the name under which their metrics are logged.
        reuse: see :class:`ReuseConfig`.
        demonstrations: responses from the data in place of sampled ones; see :class:`DemonstrationConfig`.
        clean: rules that drop training problems; see :class:`CleaningConfig`.
        max_prompt_tokens: longer prompts are dropped and counted.
        max_teacher_prompt_tokens: training problems are dropped and counted if the prompt that the teacher sees is
            longer. Only where it differs from the student's, see ``teacher_template`` of the source.
        eval_batch_size: problems per evaluation batch.
        seed: seed of the prompt order and of the rollouts. Null follows ``seed_everything``; in Python it means 0.
        template: turns the problems of all sources that are given no template into prompts.
    """

    def __init__(
        self,
        train: ProblemSource,
        benchmarks: dict[str, ProblemSource] | None = None,
        reuse: ReuseConfig = ReuseConfig(),  # noqa: B008 - frozen
        demonstrations: DemonstrationConfig = DemonstrationConfig(),  # noqa: B008 - frozen
        clean: CleaningConfig = CleaningConfig(),  # noqa: B008 - frozen
        max_prompt_tokens: int = 2048,
        max_teacher_prompt_tokens: int = 4096,
        eval_batch_size: int = 64,
        seed: int | None = None,
        template: Template | None = None,
    ) -> None:
        super().__init__()
        for name in benchmarks or {}:
            require(
                re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None,
                f"benchmarks has the name '{name}': use letters, digits, - and _ only",
            )
        for key, value in (
            ("max_prompt_tokens", max_prompt_tokens),
            ("max_teacher_prompt_tokens", max_teacher_prompt_tokens),
            ("eval_batch_size", eval_batch_size),
        ):
            require(value >= 1, f"{key} is {value}, but must be at least 1")
        self.train_source = train
        self.benchmark_sources: Mapping[str, ProblemSource] = benchmarks or {}
        for source in (train, *self.benchmark_sources.values()):
            if template is not None and isinstance(source, ProblemSource) and not source.has_own_template:
                source.template = template
        self.reuse, self.demonstrations = reuse, demonstrations
        if isinstance(train, ProblemSource) and demonstrations.share:
            train.demonstration_field = demonstrations.field
        self.clean = clean
        self.max_prompt_tokens, self.eval_batch_size = max_prompt_tokens, eval_batch_size
        self.max_teacher_prompt_tokens = max_teacher_prompt_tokens
        self.seed = DEFAULT_SEED if seed is None else checked_seed(seed)
        self.train_prompts: PromptSet | None = None
        self.cleaning_report: CleaningReport | None = None
        self.benchmarks: dict[str, PromptSet] = {}
        self._beyond_context: set[str] = set()  # models that were warned of
        self._collect: Callable[..., Pool] | None = None
        self._sample_ahead: Callable[..., None] | None = None
        self._samples_per_prompt = 1

    @property
    def train_verifier(self) -> Verifier | None:
        """Return the verifier of the training source; None without gold answers."""
        return self.train_source.verifier

    def connect(
        self,
        tokenizer: PreTrainedTokenizerBase,
        collect: Callable[..., Pool],
        samples_per_prompt: int,
        training: bool,
        sample_ahead: Callable[..., None] | None = None,
    ) -> None:
        """Set what the data needs from the model; the LightningModule calls this in its ``setup``.

        Args:
            tokenizer: the student's.
            collect: samples and scores rollouts; it also receives this data module's ``verifier``, which may be None.
            samples_per_prompt: rollouts that ``collect`` returns per prompt.
            training: also prepare the training problems.
            sample_ahead: begins to sample the next rollout buffer; needed with ``reuse.overlap``.
        """
        self._collect, self._samples_per_prompt, self._sample_ahead = collect, samples_per_prompt, sample_ahead
        self.demonstrations.check(self.reuse.prompts_per_pool * samples_per_prompt)
        self.prepare(tokenizer, training)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, training: bool) -> None:
        """Read and tokenize the problems once, benchmarks first, because training problems are compared with them.

        Args:
            tokenizer: the student's.
            training: also prepare the training problems.

        Raises:
            UsageError: a source cannot be read, or all its problems are dropped.
        """
        for name, source in self.benchmark_sources.items():
            if name not in self.benchmarks:
                prompts = prompt_set(source, tokenizer, self.max_prompt_tokens)
                ids = Counter(prompt.problem.id for prompt in prompts.prompts)
                twice = next((id_ for id_, count in ids.items() if count > 1), None)
                require(
                    twice is None,
                    f"data.benchmarks.{name} has the id '{twice}' more than once ({source.name}): samples are stored "
                    "by id, so give each problem its own, or remove the repeated ones",
                )
                dropped = f", {prompts.num_too_long} dropped as too long" if prompts.num_too_long else ""
                rank_zero_info(f"{name}: {len(prompts)} prompts from {source.name}{dropped}")
                _warn_of_unknown(f"data.benchmarks.{name}", source, prompts)
                self.benchmarks[name] = prompts
        if training and self.train_prompts is None:
            self.train_prompts = found = self._train_prompts(tokenizer)
            if self.demonstrations.share:
                self._for_all_prompts(self._check_demonstrations)
            if self.train_source.window is None:
                rank_zero_info(f"train: problems from {self.train_source.name}: {self.cleaning_report}")
            if self.cleaning_report is not None and (count := self.cleaning_report.same_id):
                rank_zero_warn(
                    f"train: {count} problems from {self.train_source.name} have the id of an earlier one, and are "
                    "left out: give each problem its own id, or set data.clean.deduplicate to false"
                )
            _warn_of_unknown("data.train", self.train_source, found, demonstrations=self.demonstrations.share > 0)

    def _train_prompts(self, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
        """Return the cleaned training prompts, and keep the report on cleaning."""
        source, limits = self.train_source, (self.max_prompt_tokens, self.max_teacher_prompt_tokens)
        texts = {name: [asked_text(p.problem) for p in prompts.prompts] for name, prompts in self.benchmarks.items()}
        if source.window is not None:
            found, self.cleaning_report = streamed_prompts(source, tokenizer, limits, self.clean, texts)
            return found
        problems, report = clean(source.store(), self.clean, texts)
        require(
            bool(problems) or report.read == 0,
            f"data.clean leaves nothing of {source.name} ({report}): give other training problems, or switch a "
            "step off, for example data.clean.decontaminate",
        )
        found = prompt_set(source, tokenizer, limits[0], problems, limits[1])
        self.cleaning_report = replace(report, too_long=found.num_too_long, teacher_too_long=found.num_teacher_too_long)
        return found

    def _for_all_prompts(self, check: Callable[[PromptFacts], None]) -> None:
        """Call a check with the facts of the training prompts, and with those of each window that is read later."""
        if self.train_prompts is not None:
            check(self.train_prompts.facts)
            if isinstance(self.train_prompts.prompts, StreamedPrompts):
                self.train_prompts.prompts.watch(check)

    def _check_demonstrations(self, facts: PromptFacts) -> None:
        for lacking in facts.lack_demonstration:
            raise UsageError(
                f"data.demonstrations.share is {self.demonstrations.share}, but {self.train_source.place(lacking)} of "
                f"{self.train_source.name} (id '{lacking.id}') has no demonstration: {MEND}"
            )

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """Raise a UsageError if a prompt has a token for which the student or the teacher has no row.

        Args:
            tokenizer: the student's.
            vocab_size: number of tokens with a row; their ids are below it.
        """

        def check(key: str, source: ProblemSource, facts: PromptFacts) -> None:
            if (found := facts.first_with_token(vocab_size)) is not None:
                index, problem = found
                token = tokenizer.convert_ids_to_tokens(index)
                raise UsageError(
                    f"data.{key}: {source.place(problem)} of {source.name} (id '{problem.id}') has a prompt with the "
                    f"token {token!r} (id {index}), but the models have rows for {vocab_size} tokens only: leave the "
                    "problem out, or give models with a row for the token"
                )

        for name, prompts in self.benchmarks.items():
            check(f"benchmarks.{name}", self.benchmark_sources[name], prompts.facts)
        self._for_all_prompts(partial(check, "train", self.train_source))

    def check_context(
        self,
        context: ContextLength | None,
        whose: str,
        key: str,
        new_tokens: int,
        *,
        training: bool,
        teacher: str | None = None,
    ) -> None:
        """Refuse prompts and responses that a model cannot read, and warn of those that it was not made for.

        Args:
            context: the model's; None if it is not known.
            whose: key of the model.
            key: of ``new_tokens``.
            new_tokens: most tokens of a response.
            training: look at the training prompts, not at those of the benchmarks.
            teacher: look at the prompts that the teacher of this name sees, which is empty if there is one for all.

        Raises:
            UsageError: see :meth:`ContextLength.check`.
        """
        if context is None:
            return

        def check(where: str, facts: PromptFacts) -> None:
            longest = facts.longest if teacher is None else facts.longest_of_teacher(teacher)
            if longest and whose not in self._beyond_context and longest + new_tokens > context.tokens:
                context.check(whose, longest, key, new_tokens, where)
                self._beyond_context.add(whose)

        if training:
            self._for_all_prompts(partial(check, "data.train"))
        for name, prompts in {} if training else self.benchmarks.items():
            check(f"data.benchmarks.{name}", prompts.facts)

    def check_teachers(self, names: Sequence[str]) -> None:
        """Raise a UsageError if a training problem names a teacher that does not exist, or none where it must.

        Args:
            names: of the teachers; empty if there is one for all.
        """
        source = self.train_source

        def check(facts: PromptFacts) -> None:
            for problem in facts.first_of_teachers():
                try:
                    check_teacher(problem, names)
                except UsageError as error:
                    raise UsageError(f"data.train: {source.place(problem)} of {source.name}, {error}") from None

        self._for_all_prompts(check)

    def train_dataloader(self) -> RolloutLoader:
        """Return the rollout loader, which refreshes the rollout buffer when needed."""
        assert self.trainer is not None
        assert self.train_prompts is not None
        assert self._collect is not None
        given = {"demonstrations": self.demonstrations.share} if self.demonstrations.share else {}
        ahead = None
        if self.reuse.overlap:
            assert self._sample_ahead is not None
            ahead = partial(self._sample_ahead, **given)
        return RolloutLoader(
            self.train_prompts.prompts,
            partial(self._collect, verifier=self.train_verifier, **given),
            samples_per_prompt=self._samples_per_prompt,
            prompts_per_pool=self.reuse.prompts_per_pool,
            batch_size=self.reuse.batch_size,
            micro_batches=self.trainer.accumulate_grad_batches,
            reuse_epochs=self.reuse.epochs,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            sample_ahead=ahead,
        )

    def val_dataloader(self) -> list[DataLoader[Prompt]]:
        """Return one loader per benchmark."""
        assert self.trainer is not None
        loaders = []
        for name, prompts in self.benchmarks.items():
            world_size = self.trainer.world_size
            require(
                len(prompts) >= world_size,
                f"data.benchmarks.{name} has {len(prompts)} problems for {world_size} processes: give fewer "
                "trainer.devices or leave it out",
            )
            problems: Any = prompts.prompts
            # Does not repeat problems to pad ranks, because that would bias pass@k.
            sampler = UnrepeatedDistributedSampler(problems, shuffle=False) if world_size > 1 else None
            collate = partial(EvaluationBatch, name, verifier=prompts.verifier)
            loaders.append(DataLoader(problems, self.eval_batch_size, sampler=sampler, collate_fn=collate))
        return loaders

    test_dataloader = val_dataloader


def _warn_of_unknown(key: str, source: ProblemSource, prompts: PromptSet, demonstrations: bool = False) -> None:
    """Warn of the texts that the tokenizer does not know as a whole, with an example of each kind.

    Args:
        key: of the source in the configuration.
        source: the source.
        prompts: its prompts.
        demonstrations: False if no demonstration is trained on.
    """
    fields = {"prompts": source.problem_field, "demonstrations": source.demonstration_field}
    said = []
    for each in prompts.unknown:
        if each.kind == "demonstrations" and not demonstrations:
            continue
        field = f", field '{name}'" if (name := fields.get(each.kind)) else ""
        piece = repr(each.piece) if each.piece else "one of its template"
        said.append(
            f"in {each.count} of {len(prompts)} {each.kind} (the first: {piece} in {source.place(each.problem)}, id "
            f"'{each.problem.id}'{field})"
        )
    if said:
        rank_zero_warn(
            f"{key}: {source.name} has characters that the student's tokenizer does not know, and replaces or leaves "
            f"out, {' and '.join(said)}: change these texts, or leave these rows out"
        )
