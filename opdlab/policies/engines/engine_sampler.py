"""What all engines share: requests with the rollouts' streams as seeds, answers by stream, a probe after each refresh.

Shapes: P prompts, n samples of each, N = P * n rollouts, T response tokens.
"""

from abc import abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.policies.decoding import NonFiniteLogitsError
from opdlab.policies.engines.probe import ProbeResult, limit, local_logprobs, probe_requests, probe_result
from opdlab.policies.engines.requests import EngineAnswer, EngineRequest, check_temperature
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.sampler import Sampler, Samples, SamplingConfig
from opdlab.progress import Progress, SilentProgress


class EngineSampler(Sampler):
    """Base of samplers whose engine has a copy of the weights.

    The seed of a request is the rollout's random stream. After each refresh, engine and model score a probe of 24
    tokens and 8 that the engine samples behind them; a difference beyond rounding raises a UsageError.
    """

    gives_logprobs = True
    _first: ProbeResult | None = None
    _last: Sequence[ProbeResult] = ()  # of each engine
    _asked: Sequence[EngineRequest] = ()  # for the last probe
    _kept: dict[EngineRequest, EngineAnswer]
    _stops: tuple[int, ...] = ()
    _excluded: tuple[int, ...] = ()
    _said_unknown = False

    def __init__(self) -> None:
        self._kept = {}

    def _engines(self) -> Sequence[int]:
        """Return the numbers of the engines, each of which has a copy of the weights."""
        return (0,)

    @abstractmethod
    def _name(self, engine: int | None = None) -> str:
        """Return what an engine, or all of them, are called in messages."""

    @abstractmethod
    def _take_over(self, model: LanguageModel, *, anew: bool) -> bool:
        """Give the engine a model's weights and empty its cache of prompts; return False if it has them already.

        Args:
            model: with the weights.
            anew: give them in any case.
        """

    @abstractmethod
    def _max_length(self) -> int | None:
        """Return the engine's largest number of tokens of prompt and response; None if it is not known."""

    @abstractmethod
    def _answers(
        self, requests: Sequence[EngineRequest], engine: int | None = None
    ) -> Generator[tuple[int, EngineAnswer] | None]:
        """Yield the index and the answer of each request as they arrive, and None so that signals are looked for.

        Args:
            requests: answers to them have no faults, see :meth:`EngineAnswer.fault`.
            engine: that answers; None for any.
        """

    # -- weights -----------------------------------------------------------------------------------------------------

    def refresh(self, model: LanguageModel, step: int) -> None:
        """Give the engine the model's weights, and compare both on a probe; see :meth:`Sampler.refresh`.

        Raises:
            NonFiniteLogitsError: the model's logits are NaN or infinite.
            UsageError: the engine fails, or the two differ on the probe.
        """
        self._kept = {}
        self._stops = tuple(model.stop_ids)
        self._excluded = tuple(range(model.vocab_size, model.head().weight.shape[0]))
        if not bool(local_logprobs(model, probe_requests(model, ())[0].prompt).isfinite().all()):
            raise NonFiniteLogitsError(step)
        taken = self._take_over(model, anew=False)
        results, bound = self._probe(model), limit(self._first)
        if not taken and max(result.worst for result in results) > bound:  # an engine was started anew
            self._take_over(model, anew=True)
            results = self._probe(model)
        for engine, result in zip(self._engines(), results, strict=True):
            last = self._last[engine] if self._last else None
            largest = float((result.engine - result.model).abs().max())
            require(
                result.worst <= bound,
                f"model.sampler: after the refresh at step {step}, {self._name(engine)} gives the tokens of a probe "
                f"other log-probabilities than the student: {result.worst:.2g} nats apart in the mean, at most "
                f"{largest:.2g}; likely: {result.likely_cause(last, bound)}",
            )
        if self._first is None:
            self._first = max(results, key=lambda result: result.worst)
            rank_zero_info(
                f"model.sampler: {self._name()} and the student give a probe log-probabilities that are "
                f"{self._first.worst:.1g} nats apart in the mean"
            )
        self._last = results

    def _probe(self, model: LanguageModel) -> list[ProbeResult]:
        self._asked = requests = probe_requests(model, self._excluded)
        return [probe_result(model, requests, self._all_answers(requests, engine)) for engine in self._engines()]

    def _all_answers(self, requests: Sequence[EngineRequest], engine: int) -> list[EngineAnswer]:
        found: dict[int, EngineAnswer] = {}
        with closing(self._answers(requests, engine)) as answers:
            for each in answers:
                if each is not None:
                    found[each[0]] = each[1]
        return [found[index] for index in range(len(requests))]

    # -- samples -----------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        streams: Tensor,
        config: SamplingConfig,
        progress: Progress | None = None,
    ) -> Samples:
        """Return sampled responses, see :meth:`Sampler.sample`.

        Where this fails, a further call with the same weights asks only for what has not arrived yet.

        Raises:
            UsageError: the engine fails, or cannot sample like this.
        """
        check_temperature(config.temperature)
        longest, most = max(map(len, prompts)) + config.max_new_tokens, self._max_length()
        require(
            most is None or longest <= most,
            f"model.sampler: prompt and response may have {longest} tokens, but {self._name()} takes {most}: start "
            f"vLLM with max_model_len {longest} or more, or lower max_new_tokens",
        )
        requests = [
            EngineRequest(
                tuple(prompt),
                config.max_new_tokens,
                stream,
                config.temperature,
                config.top_p,
                self._stops,
                self._excluded,
            )
            for prompt, row in zip(prompts, streams.tolist(), strict=True)
            for stream in row
        ]
        kept = self._kept
        missing = [request for request in dict.fromkeys(requests) if request not in kept]
        shown = (progress or SilentProgress()).task("sampling", len(requests) * config.max_new_tokens)
        with shown as advance, closing(self._answers(missing)) as answers:
            advance((len(requests) - len(missing)) * config.max_new_tokens)
            for each in answers:
                if each is None:
                    advance(0)  # looks for a signal
                    continue
                kept[missing[each[0]]] = each[1]
                advance(config.max_new_tokens)
        self._kept = {}
        self._check_weights()
        return self._samples([kept[request] for request in requests], config)

    def _check_weights(self) -> None:
        """Raise a UsageError if the engine's weights have changed while it sampled; does nothing by default."""

    def _samples(self, answers: Sequence[EngineAnswer], config: SamplingConfig) -> Samples:
        lengths = torch.tensor([len(answer.tokens) for answer in answers])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens, logprobs = torch.zeros(mask.shape, dtype=torch.long), torch.zeros(mask.shape)
        tokens[mask] = torch.tensor([token for answer in answers for token in answer.tokens])
        logprobs[mask] = torch.tensor([value for answer in answers for value in answer.logprobs])
        return Samples(tokens, mask, logprobs if self.knows_logprobs(config) else None)

    def knows_logprobs(self, config: SamplingConfig) -> bool:
        """True if the engine's log-probabilities are those at the temperature and before top-p."""
        if not self._last:
            return True
        raw = any(result.mode == "raw" for result in self._last)
        known = config.temperature == 1 if raw else config.top_p == 1
        if not known and not self._said_unknown:
            self._said_unknown = True
            what = "at temperature 1" if raw else "after top-p"
            mend = "; start vLLM with --logprobs-mode processed_logprobs" if raw and config.top_p == 1 else ""
            rank_zero_info(
                f"model.sampler: {self._name()} gives log-probabilities {what} only, so its own are not known at "
                f"temperature {config.temperature:g} with top_p {config.top_p:g}: they are not compared{mend}"
            )
        return known


def checked(answer: EngineAnswer, request: EngineRequest, name: str) -> EngineAnswer:
    """Return an answer; raise a UsageError that names the engine if it has a fault."""
    if (fault := answer.fault(request)) is not None:
        raise UsageError(f"model.sampler: {name} gives a wrong answer: {fault}")
    return answer
