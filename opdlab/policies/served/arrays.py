"""The protocol of ``opdlab serve-teacher``: everything that a LocalTeacher computes, as arrays.

Shapes: B rollouts, T response tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.policies.served.connection import Ask, BadAnswerError, ServerError, Servers
from opdlab.policies.served.wire import (
    BINARY,
    HEAD_PATH,
    PROTOCOL,
    TARGETS_PATH,
    answer_bytes,
    pack_rollouts,
    read_head,
    read_targets,
    request_parameters,
    response_width,
)
from opdlab.policies.tokenizers import StopTokens
from opdlab.scoring import Head
from opdlab.types import Rollouts, Targets, TeacherRequest

_GOAL_BYTES = 1 << 26  # of an answer; several are under way at a time


class Arrays:
    """Client of servers that run ``opdlab serve-teacher``.

    Args:
        servers: all serve the same model.
        about: what each server says of its teacher.

    Raises:
        ServerError: they speak another version of the protocol, or serve different models.
    """

    def __init__(self, servers: Servers, about: list[Mapping[str, Any]]) -> None:
        self._servers = servers
        for url, each in zip(servers.urls, about, strict=True):
            if each.get("protocol") != PROTOCOL:
                raise ServerError(
                    f"the teacher's server {url} speaks version {each.get('protocol')} of the protocol, and this is "
                    f"version {PROTOCOL}: install the same opdlab on both sides"
                )
            if each.get("fingerprint") != about[0].get("fingerprint"):
                raise ServerError(
                    f"the servers {servers.urls[0]} and {url} serve different teachers: start both with the same model "
                    "and the same options"
                )
        try:
            self.vocab_size, self.vocabulary = int(about[0]["vocab_size"]), str(about[0]["vocabulary"])
            self._batch_size, self._hidden_bytes = int(about[0]["batch_size"]), int(about[0]["hidden_bytes"])
            self._fingerprint, self.weights_digest = str(about[0]["fingerprint"]), about[0]["weights_digest"]
            stops = about[0]["stop_tokens"]
            self.stop_tokens = StopTokens(frozenset(stops["of_tokenizer"]), frozenset(stops["configured"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"the teacher's server {servers.urls[0]} does not describe its teacher") from error

    def check(self, request: TeacherRequest, temperature: float) -> None:
        """Do nothing: every request can be served."""
        del request, temperature

    def fingerprint(self) -> str:
        """Return the teacher's digest, as the server has computed it."""
        return self._fingerprint

    def jobs(self, rollouts: Rollouts, request: TeacherRequest) -> list[tuple[Tensor, Ask]]:
        """Return the requests that score rollouts, each with its rows; rows without a valid token need none.

        Rows of similar length go together, as many as the server scores at a time, or fewer if the answer is large.

        Args:
            rollouts: as the teacher sees them.
            request: what is wanted.
        """
        lengths = rollouts.prompt_mask.sum(1) + rollouts.mask.sum(1)
        order = lengths.argsort(descending=True, stable=True)
        order = order[rollouts.mask.bool().any(1)[order]]
        jobs = []
        while len(order):
            row = answer_bytes(request, response_width(rollouts.rows(order[: self._batch_size])), self._hidden_bytes)
            rows = order[: max(1, min(self._batch_size, _GOAL_BYTES // max(1, row)))]
            jobs.append((rows, self._scoring(rollouts.rows(rows), request)))
            order = order[len(rows) :]
        return jobs

    def _scoring(self, rollouts: Rollouts, request: TeacherRequest) -> Ask:
        shape = (len(rollouts), response_width(rollouts))

        def read(content: bytes) -> Targets:
            try:
                return read_targets(content, shape)
            except UsageError as error:
                raise BadAnswerError(str(error)) from error

        parameters = request_parameters(request, rollouts.temperature)
        body = lambda: pack_rollouts(rollouts, request)  # noqa: E731 - packed when it is sent
        return Ask(TARGETS_PATH, read, body, BINARY, parameters=parameters)

    def head(self) -> Head:
        """Return the teacher's head, at temperature 1."""

        def read(content: bytes) -> Head:
            try:
                return read_head(content)
            except (UsageError, KeyError) as error:
                raise BadAnswerError(str(error)) from error

        head: Head = self._servers.ask(Ask(HEAD_PATH, read))
        require(
            head.weight.ndim == 2 and head.weight.dtype in (torch.float32, torch.bfloat16, torch.float16), "no head"
        )
        return head
