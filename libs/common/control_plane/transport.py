"""One request, one answer: the only file that knows the HTTP library (pyreqwest).

What it promises, each held by a contract test:
- no redirect is followed, no proxy and no CA file of the environment is used, no Referer is sent;
- where `ca_file` is given it alone is trusted; a client certificate is shown where one is configured;
- an answer is read up to a limit and no further;
- only the library's own timeouts end a request, never cancellation: a cancelled caller's request runs on,
  stays in `in_flight`, and `close` waits for it;
- every exception of the library becomes a TransportError: there is no answer, the request may have arrived;
- HTTP/2 where the server offers it (one connection), else HTTP/1.1;
- no huge pages.

The client is made with the first request, hence after a fork.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from time import perf_counter

from common.config import ControlPlane
from common.control_plane import errors
from common.control_plane.verdicts import Answer

# The library's allocator asks for huge pages, and each of its heaps, one a thread, then takes 2 MB at its first use:
# 11 MB a process, measured. It reads this once, when the library is loaded; an operator's own word stands.
os.environ.setdefault("MIMALLOC_ALLOW_THP", "0")

from pyreqwest import exceptions as foreign
from pyreqwest.client import Client, ClientBuilder
from pyreqwest.http import HeaderMap, Url
from pyreqwest.runtime import runtime_multithreaded_default, runtime_worker_threads

# One thread of the library's own drives all connections, either way. Its scheduler for many threads, given one,
# is not woken by a write for every request while it is awake: 6 to 8 µs of 75 a record, measured.
runtime_worker_threads(1)
runtime_multithreaded_default(True)

ANSWER_LIMIT = 1024 * 1024
CONNECT_TIMEOUT = 10.0
IDLE_TIMEOUT = timedelta(seconds=4)  # below the 5 s after which common servers close an idle connection
PING = timedelta(seconds=10)  # HTTP/2: finds out that the one connection is dead

BORDER: Mapping[type[foreign.PyreqwestError], type[errors.TransportError]] = {
    foreign.ConnectError: errors.ConnectFailed,
    foreign.NetworkError: errors.ConnectFailed,
    foreign.TransportError: errors.ConnectFailed,
    foreign.ClientClosedError: errors.BrokenAnswer,  # on stop, under way
    foreign.RequestTimeoutError: errors.TimedOut,
    foreign.ConnectTimeoutError: errors.TimedOut,  # said of a silent server too
    foreign.ReadTimeoutError: errors.TimedOut,
    foreign.WriteTimeoutError: errors.TimedOut,
    foreign.PoolTimeoutError: errors.TimedOut,
    foreign.ReadError: errors.BrokenAnswer,
    foreign.WriteError: errors.BrokenAnswer,
    foreign.DecodeError: errors.BrokenAnswer,
    foreign.BodyDecodeError: errors.BrokenAnswer,
    foreign.JSONDecodeError: errors.BrokenAnswer,  # never: bodies are decoded elsewhere
    foreign.StatusError: errors.BrokenAnswer,  # never: every status is an answer
    foreign.RedirectError: errors.BrokenAnswer,  # never: none is followed
    foreign.RequestPanicError: errors.BrokenAnswer,
    foreign.RequestError: errors.BrokenAnswer,
    foreign.DetailedPyreqwestError: errors.BrokenAnswer,
    foreign.PyreqwestError: errors.BrokenAnswer,
    foreign.BuilderError: errors.CannotSend,
}
"""Every exception class of the library and what it is to us; a test holds it to the installed version."""

_THEIRS_REFUSED = "invalid peer certificate"
_ALERT = "received fatal alert: "
_OURS_REFUSED = ("certificate", "unknownca", "accessdenied", "handshakefailure")  # the last: OpenSSL, TLS 1.2


Headers = Sequence[tuple[str, str]]
"""Pairs and no mapping: the library copies them in two thirds of the time."""


class Transport:
    """Sends requests to one ControlPlane, as many at once as it is given."""

    def __init__(
        self, config: ControlPlane, user_agent: str, *, clock: Callable[[], float] = perf_counter
    ) -> None:
        self._config = config
        self._base = config.base_url.rstrip("/")
        self._user_agent = user_agent
        self._clock = clock
        self._client: Client | None = None
        self._closed = False
        self.in_flight = 0
        """Requests whose callers wait. The library cannot abort one: a cancelled caller leaves it to run on."""
        self._idle = asyncio.Event()

    async def send(
        self,
        method: str,
        path: str,
        headers: Headers,
        body: bytes | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """The answer, whatever its status. Raises a TransportError. `timeout` replaces the configured one."""
        client = self._client or self._build()
        begun = self._clock()
        try:
            request = client.request(method, _url(self._base, path)).headers(headers)
        except ValueError:
            # The library's text quotes the value; ours does not.
            raise errors.NotARequest("HTTP cannot carry a header or the path of this request") from None
        if body is not None:
            request = request.body_bytes(body)
        if timeout is not None:
            request = request.timeout(timedelta(seconds=timeout))
        self.in_flight += 1
        try:
            async with request.build_streamed() as response:
                read = await response.body_reader.read(ANSWER_LIMIT + 1)
                status = response.status
                content = b"" if read is None else read.to_bytes()
                if 200 <= status < 300 and len(content) <= ANSWER_LIMIT:
                    return Answer(status, content, self._clock() - begun)
                return Answer(
                    status,
                    content[:ANSWER_LIMIT],
                    self._clock() - begun,
                    response.get_header("retry-after"),
                    response.get_header("location"),
                    len(content) > ANSWER_LIMIT,
                )
        except foreign.PyreqwestError as error:
            silence = translated(error)
            silence.seconds = self._clock() - begun
            raise silence from error
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    def renew(self) -> None:
        """From the next request on, key, CA file and client certificate as they are now."""
        self._client = None

    async def close(self, timeout: float) -> int:
        """Waits for what is in flight, at most `timeout` seconds; returns how many requests it gave up.

        Those end in a TransportError; whether they arrived, nobody knows.
        """
        if self.in_flight:
            self._idle.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._idle.wait()
            except TimeoutError:
                pass
        self._closed = True
        abandoned = self.in_flight
        if self._client is not None:
            await self._client.close()
            self._client = None
        return abandoned

    def _build(self) -> Client:
        if self._closed:
            raise errors.ConnectFailed("the transport is closed")
        config = self._config
        headers = HeaderMap()
        try:
            headers.insert("X-API-Key", config.api_key.reveal(), is_sensitive=True)
        except ValueError:
            raise errors.CannotSend("the API key cannot stand in a header") from None
        timeout = timedelta(seconds=config.timeout)
        try:
            builder = (
                ClientBuilder()
                .user_agent(self._user_agent)
                .default_headers(headers)
                .follow_redirects(False)
                .referer(False)
                .error_for_status(False)
                .no_proxy()
                .gzip(False)
                .brotli(False)
                .zstd(False)
                .deflate(False)
                .timeout(timeout)
                .connect_timeout(min(timeout, timedelta(seconds=CONNECT_TIMEOUT)))
                .pool_idle_timeout(IDLE_TIMEOUT)
                .http2(True)
                .http2_keep_alive_interval(PING)
                .http2_keep_alive_timeout(PING)
            )
            if config.cert_file is not None:
                builder = builder.identity_pem(_identity(config.cert_file, config.key_file))
            with _trusting(config.ca_file):
                self._client = builder.build()
        except (OSError, ValueError) as error:
            # An SSLError is an OSError, the library's BuilderError a ValueError.
            raise errors.CannotSend(f"no TLS client: {error}") from error
        return self._client


@lru_cache(1024)
def _url(base: str, path: str) -> Url:
    """Parsed once: a session comes with many records."""
    return Url(base + path)


def translated(error: foreign.PyreqwestError) -> errors.TransportError:
    """The library's exception as ours: the one place that reads its text, because it has no class for TLS."""
    details = getattr(error, "details", None) or {}
    causes = [cause["message"] for cause in details.get("causes") or ()]
    text = causes[-1] if causes else error.message
    kind = BORDER.get(type(error), errors.BrokenAnswer)
    if kind is errors.ConnectFailed:
        if _refuses_certificate(text):
            kind = errors.TlsFailed
        elif any("(SendRequest)" in cause for cause in causes):
            kind = errors.BrokenAnswer  # connected it was: the connection was lost under way
    return kind(f"{_PHRASES[kind]}: {text}")


_PHRASES: Mapping[type[errors.TransportError], str] = {
    errors.ConnectFailed: "cannot connect",
    errors.TimedOut: "no answer in time",
    errors.BrokenAnswer: "the answer broke off",
    errors.TlsFailed: "TLS",
    errors.CannotSend: "cannot send",
}


def _refuses_certificate(text: str) -> bool:
    alert = text.partition(_ALERT)[2].lower()
    return _THEIRS_REFUSED in text or any(name in alert for name in _OURS_REFUSED)


def _identity(cert_file: str, key_file: str | None) -> bytes:
    """Certificate and key as the library wants them: one PEM. Raises OSError unless they fit each other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(cert_file, key_file, password="")  # no prompt: an encrypted key is a fault
    parts = [Path(cert_file)] if key_file is None else [Path(key_file), Path(cert_file)]
    return b"\n".join(part.read_bytes() for part in parts)


@contextmanager
def _trusting(ca_file: str | None) -> Iterator[None]:
    """While the client is built: the CA file alone is trusted; without one, the system's store.

    The library can add to the system's store but not replace it, and finds the store through these variables,
    once, while it builds. They are put back at once: other TLS in this process keeps its own trust.
    """
    if ca_file is not None:
        # The library takes a file without a certificate for an empty store; here it is a fault.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
    kept = {name: os.environ.pop(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ}
    if ca_file is not None:
        os.environ["SSL_CERT_FILE"] = ca_file
    try:
        yield
    finally:
        os.environ.pop("SSL_CERT_FILE", None)
        os.environ.update(kept)
