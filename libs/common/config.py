"""The configuration: declared once, read from files and the environment, every fault named at once.

    defaults  <  files, in order  <  $CREDENTIALS_DIRECTORY  <  DATAPLANE_<SECTION>__<KEY>, …_FILE

The files are those of the command line, else of DATAPLANE_CONFIG, so that in an image every command finds them.
Nothing else in the agent reads the environment. `load` returns a Config in which everything is valid,
or raises a ConfigError with a Fault for each thing that is not: *key: expected X, got Y*.
No message, repr or traceback shows a secret. Durations are seconds, and may be fractions.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Struct

from common import kinds
from common.kinds import Refused, show
from common.streams import Stream

MAX_FILE_BYTES = 256 * 1024
"""A configuration file is a page or two; what is longer is not one."""

MAX_VALUE_BYTES = 64 * 1024
"""The same for a file that holds one value."""

MAX_QUICK_RETRIES = 2
"""More would hold a slot that another entry can use: what fails this often is parked, and tried again."""

MASK = "***"


class Secret:
    """A text that cannot be printed: repr, str and format give `***`, only `reveal` gives the text."""

    __slots__ = ("_file", "_value")

    def __init__(self, value: str, file: str | None = None) -> None:
        self._value = value
        self._file = file

    def reveal(self) -> str:
        return self._value

    def reload(self) -> bool:
        """Read the file it came from again; True when the text changed.

        A file that is gone, empty or not yet written to its end (control characters) keeps the old text.
        """
        if self._file is None:
            return False
        try:
            value = _file_text(self._file)
        except (OSError, ValueError):
            return False
        if not value or not value.isprintable() or value == self._value:
            return False
        self._value = value
        return True

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(Secret)  # the text may change, the hash must not

    def __repr__(self) -> str:
        return MASK

    def __format__(self, spec: str) -> str:
        return MASK


class Fault(Struct, frozen=True):
    """One thing that is wrong: `key` is a dotted key, an environment variable or a file."""

    key: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.key}: expected {self.expected}, got {self.got}"


class ConfigError(Exception):
    """The configuration cannot be used; its text names every fault, one a line."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = list(faults)


_ID = r"(?!\.{1,2}$)[A-Za-z0-9._:~-]{1,128}"  # contract section 1: it goes into paths and headers

Port = Annotated[int, kinds.whole(1, 65535)]
FreePort = Annotated[int, kinds.whole(0, 65535)]
Flag = Annotated[bool, kinds.flag()]
File = Annotated[str | None, kinds.maybe(kinds.path())]
Name = Annotated[str, kinds.text("a key's name in Redis", 512, r"\S+")]
Words = Annotated[str | tuple[str, ...], kinds.one_or_list(kinds.text())]


# ---- what there is to configure --------------------------------------------------------------------------


class Capabilities(Struct, frozen=True, kw_only=True):
    """What this server registers as able to do; sent as it is written here."""

    max_concurrent_sessions: Annotated[int, kinds.whole(1, 1_000_000)] = 100
    """Sessions the ControlPlane may allocate here. Too small: it sends callers away that would have found
    room. Too large: it sends more than the AudioAPIServer can carry."""

    supported_products: Words = "speech_transcription"
    """A product code, or a list of them."""

    supported_languages: Words = "en-US"
    """A language tag, or a list of them."""


class Server(Struct, frozen=True, kw_only=True):
    """Who we are to the ControlPlane."""

    id: Annotated[str, kinds.text("1 to 128 of the characters A-Z a-z 0-9 . _ : ~ -", 128, _ID)] = (
        "api-server-001"
    )
    """Unique among all servers: two that share it share registration, heartbeat and commands."""

    region: Annotated[str, kinds.text("text of 1 to 128 printable characters", 128)] = "us-east-1"
    """Where the server stands: sent with every record, and a label of every metric."""

    ip_address: Annotated[str | None, kinds.maybe(kinds.address())] = None
    """As registered. Null: found from the route to the ControlPlane (behind NAT that is the inner one)."""

    port: Port = 8000
    """The AudioAPIServer's port, as registered; the agent itself does not listen there."""

    capabilities: Capabilities = Capabilities()


class Redis(Struct, frozen=True, kw_only=True):
    """Where the streams are."""

    host: Annotated[str, kinds.host()] = "localhost"

    port: Port = 6379

    username: Annotated[str | None, kinds.maybe(kinds.text())] = None
    """The ACL user; null is Redis's `default`."""

    password: Annotated[Secret, kinds.password()] = Secret("")
    """Empty: no AUTH is sent. Without the key, `REDIS_PASSWORD` is taken from the environment."""

    db: Annotated[int, kinds.whole(0, 65535)] = 0
    """The database with the streams; producers must write to the same one."""

    tls: Flag = False
    """Speak TLS, and verify the server's certificate and name."""

    ca_file: File = None
    """Trust these CAs (PEM) and no others. Null: those of the system."""

    cert_file: File = None
    """Our certificate (PEM), with `key_file`, when Redis asks for one."""

    key_file: File = None

    socket_timeout: Annotated[float, kinds.seconds(0.1)] = 30
    """How long an answer may take. Too small: a Redis that saves or fails over looks like an outage.
    Too large: a dead connection is noticed late, and entries wait for it."""

    cluster: Flag = False
    """The streams are on a Redis Cluster: quota_refresh and quota_response then need one hash tag."""


class ControlPlane(Struct, frozen=True, kw_only=True):
    """Where everything goes, and how hard it is tried."""

    base_url: Annotated[str, kinds.url()] = "https://control.fantasia.ai"

    api_key: Annotated[Secret, kinds.key(required=True)] = Secret("")
    """Sent as X-API-Key; never empty. Without the key, `CONTROL_PLANE_API_KEY` is taken from the environment.
    From a file it is read again when the ControlPlane refuses it: rotation needs no restart."""

    timeout: Annotated[float, kinds.seconds(0.1, 3600)] = 30
    """One request, from connecting to the answer's last byte. Too small: slow answers are thrown away and
    asked for again, as duplicates. Too large: a hanging ControlPlane holds the slots."""

    retry_attempts: Annotated[int, kinds.whole(0, 1000)] = MAX_QUICK_RETRIES
    """Quick retries within one delivery, at most 2. 0: every hiccup parks its entry for a second."""

    max_backoff: Annotated[float, kinds.seconds(0.1, 3600)] = 10
    """The longest pause of quick retries and breaker. Too small: a struggling ControlPlane gets no rest.
    Too large: its recovery is noticed late."""

    ca_file: File = None
    """Trust these CAs (PEM) and no others. Null: those of the system."""

    cert_file: File = None
    """Our certificate (PEM), with `key_file`, for mutual TLS."""

    key_file: File = None

    allow_http: Flag = False
    """Send the API key and everything else unencrypted to hosts other than loopback."""

    usage_batch_size: Annotated[int, kinds.whole(1, 1000)] = 1
    """Usage records of one session a request may carry. 1: the ControlPlane need not know batches.
    Too large: requests end at 1 MiB anyway, and one refused record splits more."""

    max_in_flight: Annotated[int, kinds.whole(1, 10_000)] = 64
    """Requests (not entries) at a time, a process, at most: fewer where the ControlPlane gives way under more.
    Too small: throughput is this over the answer time. Too large: every start begins with a push."""

    not_found_hold_seconds: Annotated[float, kinds.seconds(0, 7 * 86400)] = 300
    """How long a 404 is believed to be temporary. Too small: usage dies because its session's start was late.
    Too large: real mistakes show up late among the dead letters."""

    issuer: Annotated[str, kinds.text("text", 256)] = "control-plane"
    """The `iss` that a command's token must carry."""


class Streams(Struct, frozen=True, kw_only=True):
    """The streams' names, and how their entries are read and kept."""

    usage_records: Name = "queue:usage_records"
    session_lifecycle: Name = "queue:session_lifecycle"
    quota_refresh: Name = "queue:quota_refresh"
    quota_response: Name = "queue:quota_response"
    commands: Name = "queue:commands"

    read_count: Annotated[int, kinds.whole(1, 10_000)] = 500
    """Entries a read takes at most. Too small: a round trip for little. Too large: more in hand than is
    worked on, which a crash leaves behind."""

    visibility_timeout: Annotated[float, kinds.seconds(1)] = 20
    """A consumer that was silent for this long is taken for dead. Leases are renewed every third of it, so it
    need not cover a slow request. Too small: a busy process loses entries to others, which send them again.
    Too large: what a crash leaves behind waits."""

    claim_interval: Annotated[float, kinds.seconds(0.1)] = 5
    """How often the leavings of dead consumers are looked for. Too small: work for Redis without an end.
    Too large: it comes on top of visibility_timeout."""

    max_deliveries: Annotated[int, kinds.whole(1, 1000)] = 5
    """An entry dies as `poison` when delivering it alone has killed the process this often. Too small: one
    unlucky kill buries an innocent. Too large: the service crashes that often before it is rid of it."""

    dead_retention_days: Annotated[float | None, kinds.maybe(kinds.duration("days", 0.001, 36500))] = None
    """Dead letters older than this are discarded. Null: they are kept until an operator decides.
    Too small: gone before anybody has looked."""


class MetricsAuth(Struct, frozen=True, kw_only=True):
    """Who may read the metrics and /health/detailed."""

    api_key: Annotated[Secret, kinds.key(required=False)] = Secret("")
    """Opens them to whoever sends it. Null: only `allow` does."""

    allow: Annotated[tuple[str, ...], kinds.list_of(kinds.network())] = ("127.0.0.0/8", "::1/128")
    """Networks whose members need no key. Too wide: anyone there reads ids, figures and errors."""


class MetricsTls(Struct, frozen=True, kw_only=True):
    """The endpoints' certificate."""

    cert_file: File = None
    key_file: File = None


class Pushgateway(Struct, frozen=True, kw_only=True):
    """Where metrics are pushed to, for processes that nobody can scrape."""

    url: Annotated[str | None, kinds.maybe(kinds.url())] = None

    interval: Annotated[float, kinds.seconds(0.1)] = 15
    """Too small: load for the gateway. Too large: alerts look at old figures."""


_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class Monitoring(Struct, frozen=True, kw_only=True):
    """What others see of a running service."""

    bind: Annotated[str, kinds.host()] = "0.0.0.0"
    """The address the endpoints listen on."""

    heartbeat_interval: Annotated[float, kinds.seconds(0.1)] = 60
    """Too small: chatter. Too large: the ControlPlane takes a living server for dead."""

    command_poll_interval: Annotated[float, kinds.seconds(0.1)] = 60
    """Too small: chatter. Too large: commands wait, and their tokens (10 minutes) run out."""

    metrics_port: FreePort = 9090
    """Registrar here, forwarder + 1, notifier + 2, refresher + 3. 0: a free one each, which is logged."""

    health_check_port: FreePort = 8081
    """Likewise."""

    metrics_auth: MetricsAuth = MetricsAuth()

    metrics_tls: MetricsTls = MetricsTls()

    pushgateway: Pushgateway = Pushgateway()

    log_level: Annotated[str, kinds.one_of(*_LEVELS, aliases={"warn": "WARNING"})] = "INFO"
    """The least that is written. DEBUG may write lines per entry; ERROR hides the outages."""

    log_format: Annotated[str, kinds.one_of("json", "console", "log4j")] = "json"
    """json for machines, console for people, log4j for `timestamp [level]: message {json}`."""

    log_dir: File = None
    """`<log_dir>/<service>.log`, with daily rotation. Null: standard output."""

    log_retention_days: Annotated[int, kinds.whole(1, 36500)] = 7
    """Too small: yesterday's incident is gone. Too large: the disk is full."""

    audit_dir: File = None
    """Where the audit log goes. Null: with the other lines, as logger `audit`."""


class Shutdown(Struct, frozen=True, kw_only=True):
    """How a stop goes."""

    drain_seconds: Annotated[float, kinds.seconds(0, 3600)] = 8
    """The whole stop, settling and handing over included. Too small: what was in flight is sent again.
    Too large: whoever stops us (systemd, Kubernetes) kills us first; it must be less than their patience."""


class Commands(Struct, frozen=True, kw_only=True):
    """What the ControlPlane may have us do."""

    allow: Annotated[
        tuple[str, ...], kinds.list_of(kinds.one_of("refresh_public_keys", "health_check", "get_metrics"))
    ] = (
        "refresh_public_keys",
        "health_check",
        "get_metrics",
    )
    """Types that are run; others are refused and reported. Empty: none."""


class Config(Struct, frozen=True, kw_only=True):
    """All of it, valid. `origins`: where each value came from. `warnings`: what an operator should know."""

    server: Server = Server()
    redis: Redis = Redis()
    control_plane: ControlPlane = ControlPlane()
    streams: Streams = Streams()
    monitoring: Monitoring = Monitoring()
    shutdown: Shutdown = Shutdown()
    commands: Commands = Commands()
    warnings: tuple[str, ...] = ()
    origins: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """Every secret there is, for whoever must mask them."""
        return (self.redis.password, self.control_plane.api_key, self.monitoring.metrics_auth.api_key)


_SECTIONS = ("server", "redis", "control_plane", "streams", "monitoring", "shutdown", "commands")

_STREAM_KEYS = ("usage_records", "session_lifecycle", "quota_refresh", "quota_response", "commands")

_PLAIN_NAMES = {
    "server.id": "${SERVER_ID:-api-server-001}",
    "redis.password": "${REDIS_PASSWORD:-}",
    "control_plane.api_key": "${CONTROL_PLANE_API_KEY:-}",
}
"""Defaults that look into the environment, so that no file is needed (contract section 6)."""

_IGNORED = {"redis.retry_on_timeout": "is ignored: what times out is always tried again"}
"""Keys of older configurations."""


def _fields(section: type[Struct], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key below the section, dotted, with its kind; a section within comes as its class."""
    for field in msgspec.structs.fields(section):
        if prefix or field.name in _SECTIONS:
            key = f"{prefix}{field.name}"
            if get_origin(field.type) is Annotated:
                yield key, next(hint for hint in get_args(field.type) if isinstance(hint, kinds.Kind))
            else:
                yield key, field.type
                yield from _fields(field.type, f"{key}.")


_ALL = dict(_fields(Config))
_KINDS: dict[str, kinds.Kind] = {key: kind for key, kind in _ALL.items() if isinstance(kind, kinds.Kind)}
_KNOWN = (*_ALL, *_IGNORED)
_VARIABLES = {"DATAPLANE_" + key.upper().replace(".", "__"): key for key in (*_KINDS, *_IGNORED)}


def load(paths: Sequence[str | Path] = (), environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration from defaults, files and environment; raises ConfigError with every fault.

    Without `paths`, the files are those that DATAPLANE_CONFIG names, separated as in PATH.
    """
    found = _Found(environ)
    for path in paths or filter(None, environ.get("DATAPLANE_CONFIG", "").split(os.pathsep)):
        found.read_file(Path(path))
    found.read_credentials()
    found.read_environment()
    return found.result()


def effective(config: Config) -> dict[str, Any]:
    """The configuration as its file would say it, with secrets masked."""

    def plain(value: Any) -> Any:
        if isinstance(value, Secret):
            return MASK if value else None
        if isinstance(value, Struct):
            return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return list(value) if isinstance(value, tuple) else value

    return {name: plain(getattr(config, name)) for name in _SECTIONS}


# ---- reading it ------------------------------------------------------------------------------------------


class _Given(Struct, frozen=True):
    """A value as somebody wrote it. `template`: `${VAR}` in it is filled in. `file`: its source."""

    value: Any
    origin: str
    template: bool = False
    file: str | None = None


class _Found:
    """What the sources say, later ones over earlier ones, and what is wrong with it."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.given = {key: _Given(text, "default", template=True) for key, text in _PLAIN_NAMES.items()}
        self.faults: list[Fault] = []
        self.warnings: dict[str, None] = {}

    def fault(self, key: str, expected: str, got: str) -> None:
        self.faults.append(Fault(key, expected, got))

    def warn(self, text: str) -> None:
        self.warnings[text] = None

    def take(self, key: str, given: _Given) -> None:
        if key in _IGNORED:
            self.warn(f"{key} {_IGNORED[key]}")
        else:
            self.given[key] = given

    # files

    def read_file(self, path: Path) -> None:
        try:
            tree = _yaml(_file_bytes(path, MAX_FILE_BYTES))
        except OSError as error:
            return self.fault(str(path), "a readable file", error.strerror or type(error).__name__)
        except Refused as error:
            return self.fault(str(path), "a YAML file with a mapping of sections", error.got)
        return self._read_section(path, "", tree)

    def _read_section(self, path: Path, prefix: str, tree: Any) -> None:
        for name, value in tree.items():
            key = f"{prefix}{name}"
            kind = _ALL.get(key)
            if "." in str(name):
                self.fault(_printable(key), "a key within its section", f"one with a dot in {path}")
            elif kind is None and key not in _IGNORED:
                self.fault(_printable(key), f"a key that exists{_nearest(key)}", f"an unknown one in {path}")
            elif kind is None or isinstance(kind, kinds.Kind):
                self.take(key, _Given(value, f"file {path}", template=True))
            elif isinstance(value, dict):
                self._read_section(path, f"{key}.", value)
            elif value is not None:  # a section whose keys are all commented out is null
                self.fault(key, "a mapping", f"a {type(value).__name__} in {path}")

    # the environment

    def read_credentials(self) -> None:
        """What systemd passes: files named like the key, or like its variable."""
        directory = self.environ.get("CREDENTIALS_DIRECTORY")
        if not directory:
            return
        for variable, key in _VARIABLES.items():
            for name in (key, variable):
                file = os.path.join(directory, name)
                if os.path.exists(file):
                    self._take_file(name, key, file, f"credential {name}")

    def read_environment(self) -> None:
        for name, value in self.environ.items():
            if not name.startswith("DATAPLANE_"):
                continue
            variable = name.removesuffix("_FILE")
            if name in _VARIABLES:
                if f"{name}_FILE" in self.environ:
                    self.fault(name, f"either it or {name}_FILE", "both")
                self.take(_VARIABLES[name], _Given(value, f"environment {name}"))
            elif name != variable and variable in _VARIABLES:
                if variable not in self.environ:
                    self._take_file(name, _VARIABLES[variable], value, f"file of {name}")
            elif "__" in name:
                self.fault(name, f"a variable that exists{_nearest_variable(name)}", "an unknown one")
            elif meant := _without_underscores().get(name):
                self.warn(f"{name} is not read: the variable's name is {meant}")

    def _take_file(self, name: str, key: str, file: str, origin: str) -> None:
        try:
            self.take(key, _Given(_file_text(file), origin, file=file))
        except OSError as error:
            self.fault(name, "a readable file", error.strerror or type(error).__name__)
        except ValueError:
            self.fault(name, f"a text file of at most {MAX_VALUE_BYTES} bytes", "something else")

    # the result

    def result(self) -> Config:
        values: dict[str, Any] = {}
        for key, given in self.given.items():
            try:
                value, named = self._filled(given)
                parsed = _KINDS[key].parse(value)
            except Refused as error:
                self.fault(key, _KINDS[key].expected, error.got)
                continue
            except _Unfilled as error:
                self.fault(key, error.expected, error.got)
                continue
            values[key] = Secret(parsed, given.file) if _KINDS[key].secret else parsed
            if given.origin == "default" and named:
                self.given[key] = msgspec.structs.replace(given, origin=f"environment {named}")
        asked = values.get("control_plane.retry_attempts", 0)
        if asked > MAX_QUICK_RETRIES:
            values["control_plane.retry_attempts"] = MAX_QUICK_RETRIES
            self.warn(
                f"control_plane.retry_attempts: {MAX_QUICK_RETRIES} is used, {asked} is more than the most"
            )
        config = self._config(values)
        self._check(config, {fault.key for fault in self.faults})
        if self.faults:
            raise ConfigError([self._printable(fault) for fault in self.faults])
        return msgspec.structs.replace(config, warnings=tuple(self.warnings))

    def _filled(self, given: _Given) -> tuple[Any, str | None]:
        """The value with `${VAR}` filled in, and the last variable that was."""
        if not given.template:
            return given.value, None
        if isinstance(given.value, list):
            return [_fill(item, self.environ)[0] for item in given.value], None
        return _fill(given.value, self.environ)

    def _printable(self, fault: Fault) -> Fault:
        """The fault without any secret, even one that was put where none belongs."""
        got = fault.got
        for key, given in self.given.items():
            try:
                secret = self._filled(given)[0] if _KINDS[key].secret else ""
            except _Unfilled:
                continue
            if isinstance(secret, str) and secret:
                got = got.replace(secret, MASK).replace(repr(secret)[1:-1], MASK)
        return Fault(fault.key, fault.expected, got if len(got) <= 120 else f"{got[:120]}…")

    def _config(self, values: dict[str, Any]) -> Config:
        def build(section: type[_S], prefix: str) -> _S:
            parts = {}
            for field in msgspec.structs.fields(section):
                key = f"{prefix}{field.name}"
                if key in values:
                    parts[field.name] = values[key]
                elif key in _ALL and key not in _KINDS:
                    parts[field.name] = build(field.type, f"{key}.")
            return section(**parts)

        origins = {key: self.given[key].origin if key in self.given else "default" for key in _KINDS}
        return msgspec.structs.replace(build(Config, ""), origins=origins)

    # what one key alone cannot show

    def _check(self, config: Config, faulty: set[str]) -> None:
        control_plane = config.control_plane
        url = urlsplit(control_plane.base_url)
        if url.scheme == "http" and not (control_plane.allow_http or _is_loopback(url)):
            self.fault(
                "control_plane.base_url",
                "https (plain http only to loopback, or with control_plane.allow_http)",
                repr(control_plane.base_url),
            )
        self._check_files("redis", config.redis, "redis.tls is false", used=config.redis.tls)
        self._check_files("control_plane", control_plane, "the URL is plain http", used=url.scheme == "https")
        self._check_files("monitoring.metrics_tls", config.monitoring.metrics_tls)
        if not any(key.startswith("streams.") for key in faulty):
            self._check_streams(config)
        self._check_ports(config.monitoring)
        self._check_absent(config)

    def _check_files(
        self, section: str, tls: Redis | ControlPlane | MetricsTls, why: str = "", used: bool = True
    ) -> None:
        names = [name for name in ("ca_file", "cert_file", "key_file") if getattr(tls, name, None)]
        for name in names:
            try:
                with open(getattr(tls, name), "rb") as file:
                    file.read(1)
            except OSError as error:
                self.fault(f"{section}.{name}", "a readable file", error.strerror or type(error).__name__)
            if not used:
                self.warn(f"{section}.{name} has no effect: {why}")
        for one, other in (("cert_file", "key_file"), ("key_file", "cert_file")):
            if one in names and other not in names:
                self.fault(f"{section}.{other}", f"the file that belongs to {section}.{one}", "nothing")

    def _check_streams(self, config: Config) -> None:
        owners: dict[str, str] = {}
        for key in _STREAM_KEYS:
            stream = Stream(getattr(config.streams, key), "")
            try:
                names = (stream.name, stream.dead_key, stream.ledger_key, stream.seen_key, stream.turn_key)
            except ValueError:
                expected = "a name without braces, or with one hash tag like {quota}:requests"
                self.fault(f"streams.{key}", expected, repr(stream.name))
                continue
            taken = next((owners[name] for name in names if name in owners), None)
            if taken is not None:
                self.fault(
                    f"streams.{key}",
                    f"another name than streams.{taken} and its side keys",
                    repr(stream.name),
                )
            owners.update(dict.fromkeys(names, key))
        request, response = config.streams.quota_refresh, config.streams.quota_response
        if config.redis.cluster and _hash_tag(request) != _hash_tag(response):
            expected = "on a cluster, the hash tag of streams.quota_refresh, as in {quota}:request"
            self.fault("streams.quota_response", expected, repr(response))
        if config.redis.cluster and config.redis.db:
            self.fault("redis.db", "0, the only database of a cluster", str(config.redis.db))

    def _check_ports(self, monitoring: Monitoring) -> None:
        metrics, health = monitoring.metrics_port, monitoring.health_check_port
        for key, port in (("metrics_port", metrics), ("health_check_port", health)):
            if port > 65532:
                self.fault(
                    f"monitoring.{key}", "0, or a port with three more above it (up to 65532)", str(port)
                )
        if metrics and metrics == health:
            self.fault(
                "monitoring.health_check_port", "another port than monitoring.metrics_port", str(health)
            )
        elif metrics and health and abs(metrics - health) < 4:
            self.warn(
                f"monitoring.metrics_port {metrics} and monitoring.health_check_port {health} overlap: "
                "each service adds 0 to 3, so the four cannot share an address"
            )

    def _check_absent(self, config: Config) -> None:
        """Accepted, because the contract has it; said, because this release does not."""
        monitoring = config.monitoring
        for key, asked, instead in (
            ("redis.cluster", config.redis.cluster, "it speaks to one server"),
            ("monitoring.log_format log4j", monitoring.log_format == "log4j", "lines are written as json"),
            ("monitoring.log_dir", monitoring.log_dir, "lines go to standard output"),
            ("monitoring.audit_dir", monitoring.audit_dir, "audit lines go to standard output"),
            (
                "monitoring.metrics_tls",
                monitoring.metrics_tls != MetricsTls(),
                "metrics are served without TLS",
            ),
            ("monitoring.pushgateway.url", monitoring.pushgateway.url, "nothing is pushed"),
        ):
            if asked:
                self.warn(f"{key}: this release does not have it; {instead}")


_S = TypeVar("_S", bound=Struct)


def _is_loopback(url: SplitResult) -> bool:
    host = url.hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hash_tag(name: str) -> str:
    """What Redis Cluster hashes of a key: what is in its first braces, or all of it."""
    opened = name.find("{")
    closed = name.find("}", opened + 1)
    return name[opened + 1 : closed] if opened != -1 and closed > opened + 1 else name


# ---- ${VAR} ----------------------------------------------------------------------------------------------


class _Unfilled(ValueError):
    """A `${…}` that cannot be filled in."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(expected)
        self.expected = expected
        self.got = got


_BRACED = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(:-([^{}]*))?\})?")


def _fill(value: Any, environ: Mapping[str, str]) -> tuple[Any, str | None]:
    """The text with `${VAR}` and `${VAR:-default}` filled in; `$${` is a plain `${`."""
    if not isinstance(value, str) or "${" not in value:
        return value, None
    named = None

    def fill(match: re.Match[str]) -> str:
        nonlocal named
        name, has_default, default = match.groups()
        if match[0] == "$${":
            return "${"
        if name is None:
            raise _Unfilled("${VAR} or ${VAR:-default} ($${ for a plain ${)", "one that is malformed")
        content = environ.get(name)
        if has_default and not content:
            return str(default)
        if content is None:
            raise _Unfilled(f"the environment variable {name} to be set", "nothing")
        named = name
        return content

    return _BRACED.sub(fill, value), named


# ---- files -----------------------------------------------------------------------------------------------


def _file_bytes(path: str | Path, most: int) -> bytes:
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise Refused(f"more than {most} bytes")
    return content


def _file_text(path: str) -> str:
    """One value: the file's text without the line break at its end."""
    return _file_bytes(path, MAX_VALUE_BYTES).decode().rstrip("\r\n")


def _yaml(content: bytes) -> dict[Any, Any]:
    """The file's mapping; raises Refused, whose text shows positions and keys, but no value."""
    import yaml  # with a file only: it costs a megabyte

    try:
        # The loader in Python: the one in C dies of deep nesting, and the process with it.
        loader = yaml.SafeLoader(content)
        node = loader.get_single_node()
        if node is None:
            return {}
        _refuse_duplicates(node)
        tree = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise Refused(f"{error.problem or error.context}{where}") from None
    except Refused:
        raise
    except RecursionError:
        raise Refused("mappings or lists nested too deeply") from None
    except Exception as error:  # PyYAML lets out ValueError, AttributeError and others for odd scalars
        raise Refused(f"what YAML cannot read ({type(error).__name__})") from None
    if not isinstance(tree, dict):
        raise Refused(f"a {type(tree).__name__}")
    return tree


def _refuse_duplicates(root: Any) -> None:
    """YAML forbids a key that comes twice; PyYAML silently takes the last."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or isinstance(node.value, str):
            continue
        seen.add(id(node))
        if node.id == "sequence":
            nodes.extend(node.value)
            continue
        names = set()
        for key, value in node.value:
            if isinstance(key.value, str) and key.value != "<<":
                if key.value in names:
                    raise Refused(
                        f"the key {show(key.value)} a second time in line {key.start_mark.line + 1}"
                    )
                names.add(key.value)
            nodes.append(value)


# ---- nearest known ---------------------------------------------------------------------------------------


def _printable(key: str) -> str:
    return key if key.isprintable() and len(key) <= 80 else f"{ascii(key)[1:80]}…"


def _hint(written: str, known: Iterable[str]) -> str:
    import difflib  # for faults only

    near = difflib.get_close_matches(written, list(known), n=1)
    return f" (nearest: {near[0]})" if near else ""


def _nearest(key: str) -> str:
    """The key that was meant: the same name elsewhere, or a similar one, here before anywhere."""
    section, _, name = key.rpartition(".")
    elsewhere = [known for known in _KNOWN if known.rpartition(".")[2] == name]
    if len(elsewhere) == 1:
        return f" (nearest: {elsewhere[0]})"
    siblings = [known for known in _KNOWN if known.rpartition(".")[0] == section]
    return _hint(key, siblings) or _hint(key, _KNOWN)


def _nearest_variable(name: str) -> str:
    return _hint(name, (*_VARIABLES, *(f"{variable}_FILE" for variable in _VARIABLES)))


def _without_underscores() -> dict[str, str]:
    return {variable.replace("__", "_"): variable for variable in _VARIABLES}
