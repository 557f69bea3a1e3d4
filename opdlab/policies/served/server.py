"""The server of ``opdlab serve-teacher``: a local teacher behind HTTP.

It trusts nothing that it receives: bodies are bounded, tensors and numbers are checked, nothing is unpickled, and each
failure is one line, here and in the answer.
"""

import asyncio
import hmac
import ipaddress
import signal
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from opdlab.errors import Stopped, UsageError, first_line, printable, require
from opdlab.out_of_memory import out_of_memory
from opdlab.policies.served.wire import (
    BINARY,
    HEAD_PATH,
    MAX_ANSWER,
    MODELS_PATH,
    PROTOCOL,
    TARGETS_PATH,
    answer_bytes,
    pack_head,
    pack_targets,
    read_request,
    read_rollouts,
)
from opdlab.policies.teacher import LocalTeacher
from opdlab.processes import catching_signals
from opdlab.records import digest
from opdlab.types import Rollouts, TeacherRequest

_MAX_WAITING = 64  # requests at a time, whose bodies are in memory
_BODY_SECONDS = 60.0  # to receive a body
_END_SECONDS = 20.0  # for requests under way, after a signal
_LOOPBACK = "127.0.0.1"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class TeacherServer:
    """An application that answers the requests of :class:`opdlab.policies.ServedTeacher`.

    Requests are scored one after another, in a thread.

    Args:
        teacher: on its device.
        name: of the model, for clients.
        batch_size: rollouts that the teacher scores at a time.
        token: that each request must have; None for none.
        max_body: bytes of the largest body.
    """

    def __init__(
        self, teacher: LocalTeacher, name: str, batch_size: int, token: str | None = None, max_body: int = 64 << 20
    ) -> None:
        require(max_body >= 1, f"max_body is {max_body}, but must be at least 1")
        self._teacher, self._name, self._token, self._max_body = teacher, name, token, max_body
        head = teacher.head()
        self._hidden_bytes = head.weight.shape[1] * teacher.model.model.dtype.itemsize
        stops = teacher.model.stop_tokens
        self._about = {
            "protocol": PROTOCOL,
            "vocab_size": teacher.vocab_size,
            "vocabulary": digest(sorted(teacher.tokenizer.get_vocab().items())),
            "stop_tokens": {"of_tokenizer": sorted(stops.of_tokenizer), "configured": sorted(stops.configured)},
            "batch_size": batch_size,
            "hidden_bytes": self._hidden_bytes,
            "fingerprint": teacher.fingerprint(),
            "weights_digest": teacher.weights_digest(),
        }
        self._waiting = 0
        self._scorer = ThreadPoolExecutor(1, "teacher")

    def application(self) -> web.Application:
        """Return the application."""
        made = web.Application(middlewares=[self._guard], client_max_size=self._max_body)
        made.add_routes(
            [
                web.get(MODELS_PATH, self._models),
                web.get("/health", self._health),
                web.post(TARGETS_PATH, self._targets),
                web.get(HEAD_PATH, self._head),
            ]
        )
        return made

    def close(self) -> None:
        """Wait for the pass under way; the others are not begun."""
        self._scorer.shutdown(wait=True, cancel_futures=True)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse requests without the token, and answer every failure with one line."""
        if self._token is not None and not self._knows_token(request):
            return self._failed(request, 401, "the token is missing or wrong")
        if self._waiting >= _MAX_WAITING:
            return self._failed(request, 503, f"{_MAX_WAITING} requests are under way already")
        self._waiting += 1
        try:
            return await handler(request)
        except web.HTTPException as error:
            wide = f"a body is larger than {self._max_body} bytes: raise --max_body_mib, or send fewer rollouts"
            return self._failed(request, error.status, wide if error.status == 413 else error.reason)
        except UsageError as error:
            return self._failed(request, 400, str(error))
        except TimeoutError:
            return self._failed(request, 408, f"the body did not arrive within {_BODY_SECONDS:.0f} s")
        except ConnectionError as error:
            return self._failed(request, 400, f"the client has gone ({first_line(error)})")
        except Exception as error:
            lacks = out_of_memory(error)
            return self._failed(request, 500, lacks or f"{type(error).__name__}: {first_line(error)}")
        finally:
            self._waiting -= 1

    def _knows_token(self, request: web.Request) -> bool:
        assert self._token is not None
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, f"Bearer {self._token}".encode())

    def _failed(self, request: web.Request, status: int, said: str) -> web.Response:
        said = printable(" ".join(said.split()))[:500]
        print(f"{request.remote} {request.method} {printable(request.path)[:80]}: {status} {said}", file=sys.stderr)
        # The rest of a body is not read, so the connection cannot be used again.
        answer = web.json_response({"error": {"message": said}}, status=status)
        answer.force_close()
        return answer

    async def _models(self, request: web.Request) -> web.Response:
        about = {"id": self._name, "object": "model", "owned_by": "opdlab", "opdlab": self._about}
        return web.json_response({"object": "list", "data": [about]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _head(self, request: web.Request) -> web.Response:
        return web.Response(body=await self._in_turn(lambda: pack_head(self._teacher.head())), content_type=BINARY)

    async def _targets(self, request: web.Request) -> web.Response:
        # A page of another site cannot send this type without being asked first.
        require(request.content_type == BINARY, f"the body is {request.content_type}, but must be {BINARY}")
        size = self._teacher.vocab_size
        wanted, temperature = read_request(request.query, size)
        async with asyncio.timeout(_BODY_SECONDS):
            content = await request.read()
        rollouts = await asyncio.to_thread(read_rollouts, content, wanted, temperature, size)
        answer = answer_bytes(wanted, rollouts.tokens.numel(), self._hidden_bytes)
        require(
            answer <= MAX_ANSWER, f"the answer would have {answer} bytes, above {MAX_ANSWER}: ask for fewer rollouts"
        )
        return web.Response(body=await self._in_turn(lambda: self._scored(rollouts, wanted)), content_type=BINARY)

    def _scored(self, rollouts: Rollouts, wanted: TeacherRequest) -> bytes:
        return pack_targets(self._teacher.score(rollouts, wanted))

    async def _in_turn(self, work: Callable[[], bytes]) -> bytes:
        """Return the result of work that is done in the thread; if the client goes away before, it is not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._scorer, work)


def check_host(host: str, token: str | None, variable: str) -> None:
    """Raise a UsageError if a server would be reachable from elsewhere without a token.

    Args:
        host: to listen at.
        token: that requests must have, or None.
        variable: name of the environment variable for the token.

    Example:
        >>> check_host("127.0.0.1", None, "TOKEN")
        >>> check_host("0.0.0.0", None, "TOKEN")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: host is 0.0.0.0, which other machines can reach, but there is no token: set TOKEN ...
    """
    try:
        inside = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = False
    require(
        inside or token is not None,
        f"host is {host}, which other machines can reach, but there is no token: set {variable} to a long random text, "
        f"here and where opdlab fit runs, or leave --host out for {_LOOPBACK}",
    )


def serve(server: TeacherServer, host: str, port: int, ready: Callable[[str], Any]) -> None:
    """Answer requests until a signal comes; requests under way are finished.

    Args:
        server: answers.
        host: to listen at.
        port: to listen at; 0 for a free one.
        ready: called with the URL once requests are answered.

    Raises:
        UsageError: the address is not free, or not one of this machine.
        Stopped: the signal.
    """
    try:
        signum = asyncio.run(_serve(server, host, port, ready))
    finally:
        server.close()
    raise Stopped(signum)


async def _serve(server: TeacherServer, host: str, port: int, ready: Callable[[str], Any]) -> int:
    loop, stopped = asyncio.get_running_loop(), asyncio.Queue[int]()

    def handle(signum: int, frame: Any = None) -> None:
        """End when all is answered; a second signal ends at once."""
        if handled:
            raise Stopped(signum)
        handled.append(signum)
        loop.call_soon_threadsafe(stopped.put_nowait, signum)

    handled: list[int] = []
    runner = web.AppRunner(
        server.application(), handler_cancellation=True, shutdown_timeout=_END_SECONDS, access_log=None
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError) as error:
            said = first_line(error)
            raise UsageError(f"cannot listen at {host}, port {port} ({said}): give another --host or --port") from error
        address = runner.addresses[0]
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        with catching_signals(handle, (signal.SIGINT, signal.SIGTERM)):
            ready(f"http://{shown}:{address[1]}")
            return await stopped.get()
    finally:
        await runner.cleanup()
