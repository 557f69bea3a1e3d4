"""Requests to servers over HTTP: several servers in rotation, bounded concurrency, retries."""

import asyncio
import logging
import math
import queue
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential, wait_random

from opdlab.errors import UsageError, require
from opdlab.policies.served.address import TOKEN_VARIABLE, access_token, checked_url
from opdlab.policies.served.loop_thread import LoopThread
from opdlab.policies.served.wire import error_text

_CONNECT_SECONDS = 10.0
_LONGEST_WAIT = 30.0  # seconds between two attempts, and how long a server that failed is left out of the rotation
_LOG = logging.getLogger("lightning.pytorch")  # rank_zero_info would hide what another process meets
_POLL_SECONDS = 0.2
_LAST_SECONDS = 30.0  # for what is under way when another request has failed for good
_BUSY = (408, 425, 429)  # statuses below 500 after which the same request may succeed


class ServerError(UsageError):
    """Error for a server that does not answer, or answers with something else than was asked for."""


class RefusedError(ServerError):
    """Error for a request that a server refuses, and would refuse again.

    Args:
        owner: of the server, for the message.
        url: the server.
        status: of the answer.
        said: the server's message.
        why: what the request is for, and the mend.
    """

    def __init__(self, owner: str, url: str, status: int, said: str, why: str = "") -> None:
        super().__init__(f"{owner} {url} refuses a request ({status}: {said}){why}")
        self.url, self.status, self.said = url, status, said


class BadAnswerError(Exception):
    """Raised by :attr:`Ask.read` for an answer that is cut off or not as agreed; the request is sent again."""


class _TroubleError(Exception):
    """A failure after which the request is sent again."""


@dataclass(frozen=True)
class Ask:
    """A request, and how its answer is read.

    Args:
        path: behind the server's URL.
        body: returns the content to send; None for a GET. It is called for each attempt, so that waiting requests
            need no memory.
        read: returns the result of an answer, or another request that takes the place of this one; raises
            :class:`BadAnswerError`.
        content_type: of the body.
        server: index of the server that must answer; None for any.
        parameters: of the query.
        why: added to the message if the server refuses the request.
    """

    path: str
    read: Callable[[bytes], Any]
    body: Callable[[], bytes] | None = None
    content_type: str = "application/json"
    server: int | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    why: str = ""


class Servers:
    """Servers that give equal answers and are asked in rotation.

    A request that fails, because of a lost connection, a time limit, a status of 500 or more, or an answer that is cut
    off, is sent again, to the next server. A server that failed is left out for a while if there are others.

    Args:
        urls: such as ``http://host:8000``.
        concurrency: number of requests that are under way at a time, over all servers.
        timeout: of one attempt, seconds.
        retries: how often a request is sent again.
        retry_seconds: until the first of these attempts; each further wait is twice as long, up to half a minute.
        owner: of the servers, for messages.
        token_variable: environment variable with the servers' token.

    Raises:
        UsageError: a value is out of range.

    Example:
        >>> Servers(["http://localhost:8000/v1/"]).urls
        ['http://localhost:8000']
        >>> Servers(["localhost:8000"])
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: url is 'localhost:8000', but must begin with http:// or https:// and name a host
    """

    def __init__(
        self,
        urls: Sequence[str],
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 6,
        retry_seconds: float = 1.0,
        owner: str = "the teacher's server",
        token_variable: str = TOKEN_VARIABLE,
    ) -> None:
        require(bool(urls), "url is an empty list, but must name a server")
        self.urls = [checked_url(url, token_variable) for url in urls]
        require(len(set(self.urls)) == len(urls), f"url names a server twice: {', '.join(self.urls)}")
        require(concurrency >= 1, f"concurrency is {concurrency}, but must be at least 1")
        require(
            0 < timeout < math.inf, f"timeout is {timeout}, but must be above 0 and finite: seconds for one request"
        )
        require(retries >= 0, f"retries is {retries}, but must be at least 0")
        require(0 <= retry_seconds < math.inf, f"retry_seconds is {retry_seconds}, but must be at least 0 and finite")
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self._retry_seconds, self._owner, self._token_variable = retry_seconds, owner, token_variable
        self._turn = 0  # index of the server that is next
        self._rests_until = [0.0] * len(self.urls)  # by time.monotonic()
        self._failed = self._told = False
        self._attempts: set[asyncio.Task[Any] | None] = set()  # tasks that wait for a server's answer
        self.num_retries, self.num_answers, self.seconds = 0, 0, 0.0
        """Attempts after a failure, answers, and their summed seconds, since :meth:`reset_counts`."""

    def reset_counts(self) -> None:
        """Set the counts to 0."""
        self.num_retries, self.num_answers, self.seconds = 0, 0, 0.0

    def ask(self, ask: Ask) -> Any:
        """Return the result of one request; see :meth:`ask_all`."""
        with closing(self.ask_all([ask])) as answers:
            return next(answer[1] for answer in answers if answer is not None)

    def ask_all(self, asks: Sequence[Ask]) -> Generator[tuple[int, Any] | None]:
        """Yield the index and the result of each request, as they arrive.

        Requests run in a thread with an event loop of its own, because a notebook has one in the main thread. A caller
        that stops early, as after a signal, cancels the others.

        Yields:
            Also None, several times a second, so that the caller can look for signals.

        Raises:
            ServerError: a request has failed too often. What arrived before is yielded before.
        """
        if not asks:
            return
        found: queue.SimpleQueue[tuple[int, Any] | BaseException] = queue.SimpleQueue()
        work = LoopThread(self._all(asks, found.put), found.put)
        work.start()
        try:
            left = len(asks)
            while left:
                try:
                    one = found.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(one, BaseException):
                    raise one
                left -= 1
                yield one
        finally:
            work.end()

    async def _all(self, asks: Sequence[Ask], put: Callable[[tuple[int, Any]], None]) -> None:
        limit = asyncio.Semaphore(self.concurrency)
        headers = {"Authorization": f"Bearer {token}"} if (token := access_token(self._token_variable)) else {}
        async with aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self.timeout, sock_connect=_CONNECT_SECONDS),
            connector=aiohttp.TCPConnector(limit=0),
        ) as session:

            async def answered(index: int, ask: Ask) -> None:
                async with limit:
                    result: Any = ask
                    while isinstance(result, Ask):
                        result = await self._with_retries(session, result)
                put((index, result))

            tasks = {asyncio.create_task(answered(index, ask)) for index, ask in enumerate(asks)}
            self._failed, self._attempts = False, set()
            try:
                await self._finish(tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _finish(self, tasks: set[asyncio.Task[None]]) -> None:
        """Wait for tasks. If one fails, those that wait for a server go on for a while, and no others begin."""
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = next((error for task in done if (error := task.exception()) is not None), None)
        if failed is None:
            return
        self._failed = True
        for task in pending - self._attempts:
            task.cancel()
        if last := pending & self._attempts:
            await asyncio.wait(last, timeout=_LAST_SECONDS)
        raise failed

    async def _with_retries(self, session: aiohttp.ClientSession, ask: Ask) -> Any:
        attempts = AsyncRetrying(
            stop=lambda state: self._failed or state.attempt_number > self.retries,
            wait=wait_exponential(self._retry_seconds, _LONGEST_WAIT) + wait_random(0, self._retry_seconds),
            retry=retry_if_exception_type(_TroubleError),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            async for attempt in attempts:
                with attempt:
                    if attempt.retry_state.attempt_number > 1:
                        self.num_retries += 1
                    task = asyncio.current_task()
                    self._attempts.add(task)
                    try:
                        return await self._once(session, ask)
                    finally:
                        self._attempts.discard(task)
        except _TroubleError as error:
            times = f"{1 + self.retries} times" if self.retries else "once"
            raise ServerError(
                f"{error}; the request was sent {times}: look at the server's log and start it; a run that has begun "
                "goes on with --ckpt_path last"
            ) from error
        raise AssertionError("the loop returns or raises")

    def _tell(self, state: RetryCallState) -> None:
        """Say at the first failure of all that requests are sent again, which may take minutes; in any process."""
        if not self._told and state.outcome is not None:
            self._told = True
            _LOG.info(f"{state.outcome.exception()}; failed requests are sent again, up to {self.retries} times")

    async def _once(self, session: aiohttp.ClientSession, ask: Ask) -> Any:
        index = self._next() if ask.server is None else ask.server
        url, started = self.urls[index], time.monotonic()
        body = None if ask.body is None else ask.body()
        kind = {} if body is None else {"Content-Type": ask.content_type}
        method = "GET" if body is None else "POST"
        try:
            async with session.request(
                method, url + ask.path, data=body, headers=kind, params=ask.parameters, allow_redirects=False
            ) as response:
                status, content = response.status, await response.read()
        except TimeoutError as error:
            connected = not isinstance(error, aiohttp.ServerTimeoutError)
            seconds = self.timeout if connected else min(_CONNECT_SECONDS, self.timeout)
            raise self._trouble(index, f"does not answer within {seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._trouble(index, f"does not answer ({_reason(error)})") from error
        if status >= 500 or status in _BUSY:
            raise self._trouble(index, f"answers {status}: {error_text(content)}")
        if status != 200:
            named = f"; give its token in {self._token_variable}" if status in (401, 403) else ask.why
            raise RefusedError(self._owner, url, status, error_text(content), named)
        try:
            result = await asyncio.to_thread(ask.read, content)
        except BadAnswerError as error:
            raise self._trouble(index, f"gives a wrong answer: {error}") from error
        self._rests_until[index] = 0.0
        self.num_answers, self.seconds = self.num_answers + 1, self.seconds + time.monotonic() - started
        return result

    def _next(self) -> int:
        """Return the next server of the rotation that has not just failed; the one that failed first if all have."""
        now, count = time.monotonic(), len(self.urls)
        turns = [(self._turn + step) % count for step in range(count)]
        awake = [index for index in turns if self._rests_until[index] <= now]
        chosen = awake[0] if awake else min(turns, key=self._rests_until.__getitem__)
        self._turn = (chosen + 1) % count
        return chosen

    def _trouble(self, index: int, what: str) -> _TroubleError:
        self._rests_until[index] = time.monotonic() + _LONGEST_WAIT
        return _TroubleError(f"{self._owner} {self.urls[index]} {what}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
