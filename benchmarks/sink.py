"""The receiver: says yes to everything, faster than anybody asks, and writes down what it got.

Delivery is counted here and nowhere else: a line in its log for every request, with the Idempotency-Key.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from benchmarks.processes import Process, cpu_seconds, family

ANSWER = '{"success":true,"new_quota_amount":3600,"final_quota":false,"keys":[],"commands":[]}'

NGINX = """
daemon off;
master_process off;
worker_processes 1;
pid nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  default_type application/json;
  keepalive_requests 100000000;
  keepalive_timeout 600s;
  client_max_body_size 8m;
  log_format receiver '$msec $http_content_length $server_protocol $http_idempotency_key';
  ssl_certificate {certificate};
  ssl_certificate_key {certificate};
  ssl_protocols TLSv1.2 TLSv1.3;
  server {{
    listen 127.0.0.1:{http1} ssl backlog=4096;
    listen 127.0.0.1:{http2} ssl http2 backlog=4096;
    access_log {log} receiver buffer=64k flush=50ms;
    location / {{ return 200 '{answer}'; }}
  }}
}}
"""


def find_nginx() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Receiver:
    """Reads a sink's log as it grows: which records came, and when."""

    def __init__(self, log: Path, body_length: int) -> None:
        self._log = log
        self._body_length = body_length
        self._offset = 0
        self.forget()

    def forget(self) -> None:
        """Be as new: what has been written so far is of an earlier run."""
        self._rest = b""
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        self.arrivals: list[tuple[float, int]] = []
        self.requests = 0
        self.repeated = 0
        self.refused = 0
        self.protocols: set[str] = set()
        self.keys: set[bytes] = set()
        self.records = 0

    def read(self) -> int:
        """Reads on; returns how many different records have come."""
        if not self._log.exists():
            return self.records
        with self._log.open("rb") as file:
            file.seek(self._offset)
            read = self._rest + file.read()
            self._offset = file.tell()
        *lines, self._rest = read.split(b"\n")
        for line in lines:
            moment, length, protocol, key = line.split(b" ", 3)
            if key == b"-":
                continue
            if protocol == b"REFUSED":
                self.refused += 1
                continue
            self.requests += 1
            if key in self.keys:
                self.repeated += 1
                continue
            self.keys.add(key)
            self.protocols.add(protocol.decode())
            number = records_in(int(length), self._body_length)
            self.records += number
            self.arrivals.append((float(moment), number))
        return self.records

    def until(self, records: int, check: Callable[[], None], within: float = 120.0) -> None:
        """Returns when so many records have come; raises TimeoutError, or what `check` raises."""
        deadline = time.monotonic() + within
        while self.read() < records:
            check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.records} of {records} records came in {within} s")
            time.sleep(0.05)


def records_in(length: int, body_length: int) -> int:
    """How many records a body of this length carries: one, or a batch of them all of one length."""
    envelope = len('{"usage_records":[]}')
    if length < body_length + envelope:
        return 1
    number, rest = divmod(length - envelope + 1, body_length + 1)
    if rest:
        raise ValueError(f"{length} bytes are no whole number of records")
    return number


class Sink:
    """nginx, or what stands in for it: HTTP/1.1 and HTTP/2, one process."""

    def __init__(self, directory: Path, ca_file: Path, certificate: Path, body_length: int) -> None:
        directory.mkdir()
        self.ca_file = ca_file
        log = directory / "access.log"
        nginx = find_nginx()
        self.name = "nginx" if nginx else "slow_sink without delay"
        if nginx:
            http1, http2 = free_port(), free_port()
            configuration = directory / "nginx.conf"
            configuration.write_text(
                NGINX.format(certificate=certificate, http1=http1, http2=http2, log=log, answer=ANSWER)
            )
            argv = [nginx, "-p", str(directory), "-c", str(configuration)]
            self.process = Process(argv, directory / "output.log")
        else:
            self.process, http1 = start_slow(directory, certificate, log, 0.0)
            http2 = http1
        self.urls = {False: f"https://localhost:{http1}", True: f"https://localhost:{http2}"}
        self.receiver = Receiver(log, body_length)
        _await_port(http1, self.process)
        _await_port(http2, self.process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop(2.0)

    def ceiling(self, body: bytes, requests: int = 20_000, window: int = 100) -> dict[str, float]:
        """Requests a second when the sender costs next to nothing: pipelined over one connection."""
        url = self.urls[False]
        request = (
            f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        burst = request * window
        context = ssl.create_default_context(cafile=str(self.ca_file))
        port = int(url.rsplit(":", 1)[1])
        with (
            socket.create_connection(("127.0.0.1", port)) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as connection,
        ):
            pids = family([self.process.pid])
            cpu, begun = cpu_seconds(pids), time.perf_counter()
            for _ in range(requests // window):
                connection.sendall(burst)
                answered = 0
                received = b""
                while answered < window:
                    received += connection.recv(262_144)
                    answered = received.count(b'"commands":[]}')
            seconds = time.perf_counter() - begun
            cpu = cpu_seconds(pids) - cpu
        sent = requests // window * window
        return {"requests_per_second": sent / seconds, "cpu_us_per_request": cpu / sent * 1e6}


class SlowSink:
    """A ControlPlane that takes its time."""

    def __init__(
        self,
        directory: Path,
        ca_file: Path,
        certificate: Path,
        body_length: int,
        delay: float,
        **manner: int,
    ) -> None:
        directory.mkdir(exist_ok=True)
        log = directory / f"access-{time.time_ns()}.log"
        self.ca_file = ca_file
        self.process, port = start_slow(directory, certificate, log, delay, **manner)
        self.url = f"https://localhost:{port}"
        self.receiver = Receiver(log, body_length)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop(2.0)


def start_slow(
    directory: Path, certificate: Path, log: Path, delay: float, **manner: int
) -> tuple[Process, int]:
    """`manner`: the further options of slow_sink."""
    argv = [sys.executable, "-m", "benchmarks.slow_sink"]
    argv += ["--certificate", str(certificate), "--log", str(log), "--delay", str(delay)]
    for option, value in manner.items():
        argv += [f"--{option.replace('_', '-')}", str(value)]
    process = Process(argv, directory / f"slow-{time.time_ns()}.log")
    return process, int(process.await_events("listening")[0]["port"])


def _await_port(port: int, process: Process) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            process.check()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
