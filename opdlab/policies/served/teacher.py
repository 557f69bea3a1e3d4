"""A teacher on a server: vLLM's, or one of ``opdlab serve-teacher``.

Shapes: B rollouts, T response tokens.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.served.arrays import Arrays
from opdlab.policies.served.completions import Completions
from opdlab.policies.served.connection import Servers
from opdlab.policies.served.models import find_model
from opdlab.policies.served.probe import agreement, probe_rollouts, probe_tokens, self_difference
from opdlab.policies.served.prompt_scores import MIN_TAIL
from opdlab.policies.teacher import LocalTeacher, Teacher, blank_targets
from opdlab.policies.tokenizers import check_same_vocabulary
from opdlab.progress import Progress, SilentProgress
from opdlab.records import digest
from opdlab.scoring import Head
from opdlab.types import MergedTargets, Rollouts, Targets, TeacherRequest


class ServedTeacher(Teacher):
    """A teacher on one or several servers.

    With ``opdlab serve-teacher`` it computes everything that a :class:`LocalTeacher` does. With vLLM
    (``/v1/completions`` with ``prompt_logprobs``) it computes, at temperature 1, the log-probabilities of sampled
    tokens and the teacher's most likely tokens with any tail; at another temperature the most likely tokens for
    ``tail: renormalize`` only, without log-probabilities and masses. Everything else is refused at the start.

    Tokens are sent as ids, so no template is applied. Before training, a probe of 24 tokens is scored: the servers must
    agree with themselves and with each other, must not shift positions, and must have the student's tokens.

    A server that needs a token gets the one in the environment variable ``OPDLAB_TEACHER_TOKEN``.

    Args:
        url: of the server, such as ``http://localhost:8000``; or a list of servers of the same model, which are asked
            in rotation.
        model: its name on the server; null for the only one there.
        reference: path or hub id of the same model, which is loaded once at the start to compare both on the probe, and
            then freed; null to compare the server with itself only.
        concurrency: requests under way at a time, over all servers, for each process of the run.
        timeout: of one attempt, seconds. The first request to vLLM may take a minute.
        retries: how often a failed request is sent again, to the next server.
        retry_seconds: until the first of these attempts; each further wait is twice as long, up to half a minute.

    Raises:
        UsageError: a value is out of range.
    """

    def __init__(
        self,
        url: str | list[str],
        model: str | None = None,
        reference: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 6,
        retry_seconds: float = 1.0,
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        self._servers = Servers(urls, concurrency, timeout, retries, retry_seconds)
        self._model, self._reference = model, reference
        self._client: Arrays | Completions | None = None
        self._device = torch.device("cpu")
        self._head: Head | None = None
        self._told_tail = False

    # -- start ---------------------------------------------------------------------------------------------------

    def bind(self, student: LanguageModel) -> None:
        """Ask the servers for their model, and compare them on a probe.

        Raises:
            UsageError: a server does not answer, serves another model, or scores other tokens than it is sent.
        """
        self.tokenizer = student.tokenizer
        found = [
            find_model(self._servers, server, self._model, "model.teacher", "vLLM or `opdlab serve-teacher`")
            for server in range(len(self._servers.urls))
        ]
        name, about = found[0]
        kinds = {"opdlab" in each for _, each in found}
        require(len(kinds) == 1, f"url names servers of vLLM and of opdlab: {', '.join(self._servers.urls)}")
        if "opdlab" in about:
            arrays = Arrays(self._servers, [each["opdlab"] for _, each in found])
            vocabulary = digest(sorted(student.tokenizer.get_vocab().items()))
            require(
                arrays.vocabulary == vocabulary,
                f"model.teacher at {self._servers.urls[0]} and model.student have different vocabularies: serve a "
                "teacher with the student's tokenizer",
            )
            self._client, self.stop_tokens = arrays, arrays.stop_tokens
        else:
            lengths = [length for _, each in found if isinstance(length := each.get("max_model_len"), int)]
            self._client = Completions(self._servers, name, student.vocab_size, min(lengths, default=None))
        self.vocab_size = self._client.vocab_size
        self._check_probe(student, name)

    def _check_probe(self, student: LanguageModel, name: str) -> None:
        """Score the probe, compare what must be equal, and say how large the differences are."""
        assert self._client is not None
        tokens = probe_tokens(student.tokenizer, min(self.vocab_size, student.vocab_size))
        said = []
        if isinstance(self._client, Completions):
            texts = {token: student.tokenizer.decode([token]) for token in tokens}
            if (sampled := self._client.probe(tokens, texts)) is not None:
                said.append(f"with what they sample from, to {sampled:.1g}")
        rollouts, where = probe_rollouts(tokens), " and ".join(self._servers.urls)
        logprobs = self.score(rollouts, TeacherRequest()).logprobs
        said.insert(0, f"with themselves, to {self_difference(logprobs, where):.1g} nats")
        if self._reference is not None:
            local = LocalTeacher(self._reference)
            check_same_vocabulary(student.tokenizer, local.tokenizer)
            theirs = local.score(rollouts, TeacherRequest(vocab_size=min(self.vocab_size, local.vocab_size))).logprobs
            found = agreement(logprobs[0], theirs[0], where)
            moved = ", ".join(f"{shift:+d}: {mean:.1f}" for shift, mean in found.shifted.items())
            said.append(
                f"with {self._reference}, to {found.largest:.1g} (mean {found.mean:.1g}; moved by a position {moved})"
            )
        rank_zero_info(f"teacher {name} at {where}: log-probabilities of a probe agree {'; '.join(said)}")

    def check_request(self, request: TeacherRequest, temperature: float) -> None:
        """Refuse what the servers cannot compute, such as more most likely tokens than their maximum.

        Raises:
            UsageError: see above.
        """
        self._bound().check(request, temperature)
        if isinstance(self._client, Completions) and request.tail and not self._told_tail:
            self._told_tail = True
            rank_zero_info(
                f"the teacher's probability outside the support is 1 less that of its {request.top_k} tokens, and at "
                f"least {MIN_TAIL:g}: it is not known better"
            )

    def _bound(self) -> "Arrays | Completions":
        if self._client is None:
            raise UsageError("model.teacher is a ServedTeacher that does not know its student: call bind first")
        return self._client

    # -- scoring -------------------------------------------------------------------------------------------------

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        """Return the targets of ``rollouts``; see :meth:`Teacher.score`."""
        rollouts = rollouts.as_teacher_sees()
        merged = MergedTargets(*rollouts.tokens.shape)
        for rows, part in self.score_in_parts(rollouts, request, progress):
            merged.put(rows, part)
        return merged.targets()

    def score_in_parts(
        self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None
    ) -> Iterator[tuple[Tensor, Targets]]:
        """Yield the targets of rows as they arrive; see :meth:`Teacher.score_in_parts`.

        Raises:
            UsageError: a request cannot be served, or the servers fail.
        """
        client, rollouts = self._bound(), rollouts.as_teacher_sees().to("cpu")
        client.check(request, rollouts.temperature)
        self._servers.reset_counts()
        jobs = client.jobs(rollouts, request)
        empty = (~rollouts.mask.bool().any(1)).nonzero().view(-1)
        if len(empty) or not len(rollouts):
            yield empty, self._blank(rollouts.rows(empty), request)
        shown = (progress or SilentProgress()).task("scoring (teacher)", len(rollouts))
        with shown as advance, closing(self._servers.ask_all([ask for _, ask in jobs])) as answers:
            advance(len(empty))
            for answer in answers:
                if answer is None:
                    advance(0)  # looks for a signal
                    continue
                rows = jobs[answer[0]][0]
                yield rows, answer[1]
                advance(len(rows))

    def _blank(self, rollouts: Rollouts, request: TeacherRequest) -> Targets:
        """Return the targets of rollouts without a valid token."""
        size = min(self.vocab_size, request.vocab_size or self.vocab_size)
        targets = blank_targets(rollouts.tokens.shape, request, size)
        if request.hidden:
            weight = self.head().weight
            hidden = torch.zeros(*rollouts.tokens.shape, weight.shape[1], dtype=weight.dtype)
            targets = replace(targets, hidden=hidden)
        if isinstance(self._client, Completions) and rollouts.temperature != 1:
            targets = replace(targets, support_mass=None)
        return targets

    def metrics(self) -> dict[str, float]:
        """Return the number of repeated requests and the mean time of one; see :meth:`Teacher.metrics`."""
        servers = self._servers
        return {
            "targets/retries": float(servers.num_retries),
            "targets/request_seconds": servers.seconds / max(servers.num_answers, 1),
        }

    def head(self, temperature: float = 1.0) -> Head:
        """Return the teacher's head, which ``opdlab serve-teacher`` sends once; see :meth:`Teacher.head`."""
        if not isinstance(self._bound(), Arrays):
            return super().head(temperature)
        if self._head is None:
            assert isinstance(self._client, Arrays)
            self._head = self._client.head().on(self._device)
        return replace(self._head, temperature=temperature)

    def to(self, device: torch.device) -> None:
        """Move the head, if it has been fetched."""
        self._device = device
        self._head = None if self._head is None else self._head.on(device)

    # -- identity ------------------------------------------------------------------------------------------------

    def weights_digest(self) -> str | None:
        """Return the digest of ``opdlab serve-teacher``; None with vLLM, whose log-probabilities vary by rounding."""
        return self._bound().weights_digest

    def fingerprint(self) -> str:
        """Return a digest of the teacher; see :meth:`Teacher.fingerprint`.

        With vLLM it is made of the model's name and of the probe's log-probabilities, rounded to a sixteenth nat: a
        value near the edge of a sixteenth may fall on its other side in another run, which then scores again.
        """
        return self._bound().fingerprint()
