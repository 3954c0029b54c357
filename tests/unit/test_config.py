"""The configuration: what is read from where, what it becomes, and how each fault is named."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common import config
from common.config import Config, ConfigError, Monitoring, Secret, Server, effective, load

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"
KEY = {"CONTROL_PLANE_API_KEY": "k-1"}


def variable(key: str) -> str:
    return "DATAPLANE_" + key.upper().replace(".", "__")


def value_of(loaded: Config, key: str) -> Any:
    value: Any = loaded
    for name in key.split("."):
        value = getattr(value, name)
    return value


def faults(*paths: Path, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(paths, KEY | environ)
    return [str(fault) for fault in caught.value.faults]


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str | bytes, name: str = "agent.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# ---- sources ---------------------------------------------------------------------------------------------


def test_without_any_file_the_defaults_and_the_environment_suffice() -> None:
    loaded = load((), KEY)
    assert loaded.control_plane.api_key.reveal() == "k-1"
    assert loaded.server == Server()
    assert loaded.monitoring == Monitoring()
    assert loaded.warnings == ()


def test_the_example_says_exactly_the_defaults() -> None:
    assert load([EXAMPLE], KEY) == msgspec.structs.replace(
        load((), KEY), origins=load([EXAMPLE], KEY).origins
    )


def test_the_example_names_every_key() -> None:
    origins = load([EXAMPLE], KEY).origins
    assert {key for key, origin in origins.items() if origin != f"file {EXAMPLE}"} == set()


@pytest.mark.parametrize(
    ("name", "given", "key", "want"),
    [
        ("REDIS_HOST", "redis.internal", "redis.host", "redis.internal"),
        ("REDIS_PORT", "6380", "redis.port", 6380),
        ("REDIS_PASSWORD", "pw", "redis.password", Secret("pw")),
        ("REDIS_DB", "3", "redis.db", 3),
        ("CONTROL_PLANE_BASE_URL", "https://cp.example/", "control_plane.base_url", "https://cp.example"),
        ("CONTROL_PLANE_API_KEY", "other", "control_plane.api_key", Secret("other")),
        ("CONTROL_PLANE_TIMEOUT", "2.5", "control_plane.timeout", 2.5),
        ("SERVER_ID", "api-9", "server.id", "api-9"),
        ("SERVER_REGION", "eu-1", "server.region", "eu-1"),
        ("LOG_LEVEL", "debug", "monitoring.log_level", "DEBUG"),
    ],
)
def test_the_example_fills_in_the_plain_names(name: str, given: str, key: str, want: Any) -> None:
    assert value_of(load([EXAMPLE], KEY | {name: given}), key) == want


def test_a_later_file_overrides_an_earlier_one_key_by_key(written: Any) -> None:
    base = written("redis: {host: a, port: 7000}\nmonitoring: {metrics_auth: {api_key: m}}", "base.yaml")
    late = written("redis: {host: b}\nmonitoring: {metrics_auth: {allow: [10.0.0.0/8]}}", "production.yaml")
    loaded = load([base, late], KEY)
    assert (loaded.redis.host, loaded.redis.port) == ("b", 7000)
    assert loaded.monitoring.metrics_auth == config.MetricsAuth(api_key=Secret("m"), allow=("10.0.0.0/8",))


def test_the_environment_beats_credentials_beat_files_beat_defaults(written: Any, tmp_path: Path) -> None:
    file = written("redis: {host: file, port: 1, db: 1}")
    (tmp_path / "redis.port").write_text("2\n")
    (tmp_path / "redis.db").write_text("2\n")
    (tmp_path / "DATAPLANE_CONTROL_PLANE__API_KEY").write_text("credential\n")
    environ = KEY | {"CREDENTIALS_DIRECTORY": str(tmp_path), "DATAPLANE_REDIS__DB": "3"}
    loaded = load([file], environ)
    assert (loaded.redis.host, loaded.redis.port, loaded.redis.db) == ("file", 2, 3)
    assert loaded.control_plane.api_key.reveal() == "credential"
    assert {key: loaded.origins[key] for key in ("redis.host", "redis.port", "redis.db", "redis.tls")} == {
        "redis.host": f"file {file}",
        "redis.port": "credential redis.port",
        "redis.db": "environment DATAPLANE_REDIS__DB",
        "redis.tls": "default",
    }
    assert loaded.origins["control_plane.api_key"] == "credential DATAPLANE_CONTROL_PLANE__API_KEY"


def test_a_default_that_looks_into_the_environment_says_so() -> None:
    origins = load((), KEY).origins
    assert origins["control_plane.api_key"] == "environment CONTROL_PLANE_API_KEY"
    assert origins["server.id"] == "default"


def test_every_key_has_a_variable_and_a_variable_for_a_file_and_no_two_share_one() -> None:
    names = [name for key in load((), KEY).origins for name in (variable(key), variable(key) + "_FILE")]
    assert len(names) == len(set(names))


def test_every_key_can_be_read_from_a_file(written: Any) -> None:
    environ = {
        "DATAPLANE_CONTROL_PLANE__API_KEY_FILE": str(written("from-file\n", "key")),
        "DATAPLANE_REDIS__CA_FILE_FILE": str(written(str(EXAMPLE), "ca-name")),
        "DATAPLANE_REDIS__PORT_FILE": str(written("7001\r\n", "port")),
        "DATAPLANE_REDIS__TLS": "true",
    }
    loaded = load((), environ)
    assert loaded.control_plane.api_key.reveal() == "from-file"
    assert loaded.redis.ca_file == str(EXAMPLE)
    assert loaded.redis.port == 7001
    assert loaded.origins["redis.port"] == "file of DATAPLANE_REDIS__PORT_FILE"


def test_a_value_and_a_file_for_the_same_key_are_a_fault(written: Any) -> None:
    got = faults(DATAPLANE_REDIS__HOST="a", DATAPLANE_REDIS__HOST_FILE=str(written("b")))
    assert got == ["DATAPLANE_REDIS__HOST: expected either it or DATAPLANE_REDIS__HOST_FILE, got both"]


def test_an_empty_file_and_empty_sections_say_nothing(written: Any) -> None:
    assert load([written("")], KEY).redis == config.Redis()
    assert load([written("# all commented out\nredis:\nmonitoring: {metrics_auth: }")], KEY).warnings == ()


def test_anchors_and_merge_keys_are_yaml_like_any_other(written: Any) -> None:
    text = "redis: &a {host: one, port: 1}\ncontrol_plane: {timeout: &t 5, max_backoff: *t}\n"
    assert load([written(text)], KEY).control_plane.max_backoff == 5
    merged = "x: &x {host: one}\nredis: {<<: *x, host: two}\n"
    assert faults(written(merged)) == [
        f"x: expected a key that exists, got an unknown one in {written(merged)}"
    ]


# ---- ${VAR} ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("${NAME}", "content"),
        ("${NAME:-default}", "content"),
        ("${GONE:-default}", "default"),
        ("${EMPTY:-default}", "default"),
        ("a-${NAME}-${GONE:-b}", "a-content-b"),
        ("${NESTED}", "${NAME}"),  # what is filled in is not filled in again
        ("$${NAME}", "${NAME}"),
        ("$NAME and 5$", "$NAME and 5$"),
    ],
)
def test_variables_are_filled_in(written: Any, given: str, want: str) -> None:
    environ = KEY | {"NAME": "content", "EMPTY": "", "NESTED": "${NAME}"}
    assert load([written(f"server: {{region: '{given}'}}")], environ).server.region == want


def test_variables_are_filled_in_within_lists(written: Any) -> None:
    file = written('monitoring: {metrics_auth: {allow: ["${NET}", 10.0.0.0/8]}}')
    assert load([file], KEY | {"NET": "10.1.0.0/16"}).monitoring.metrics_auth.allow == (
        "10.1.0.0/16",
        "10.0.0.0/8",
    )


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("${GONE}", "expected the environment variable GONE to be set, got nothing"),
        ("${}", "expected ${VAR} or ${VAR:-default} ($${ for a plain ${), got one that is malformed"),
        ("${A-b}", "expected ${VAR} or ${VAR:-default} ($${ for a plain ${), got one that is malformed"),
        ("${A:-${B}}", "expected ${VAR} or ${VAR:-default} ($${ for a plain ${), got one that is malformed"),
    ],
)
def test_a_variable_that_cannot_be_filled_in_is_a_fault(written: Any, given: str, want: str) -> None:
    assert faults(written(f"server: {{region: '{given}'}}")) == [f"server.region: {want}"]


def test_an_unset_variable_that_a_later_source_overrides_is_none(written: Any) -> None:
    file = written("server: {region: '${GONE}'}")
    assert load([file], KEY | {"DATAPLANE_SERVER__REGION": "r"}).server.region == "r"


def test_files_named_in_the_environment_are_read_when_the_command_line_names_none(written: Any) -> None:
    base, later = written("server: {id: a, region: r}", "base"), written("server: {id: b}", "later")
    environ = KEY | {"DATAPLANE_CONFIG": f"{base}{os.pathsep}{later}"}
    assert (load((), environ).server.id, load((), environ).server.region) == ("b", "r")
    assert load([base], environ).server.id == "a"
    assert load((), KEY | {"DATAPLANE_CONFIG": ""}).server.id == "api-server-001"


def test_values_of_the_environment_are_taken_as_they_are() -> None:
    assert load((), KEY | {"DATAPLANE_REDIS__PASSWORD": "${HOME}"}).redis.password.reveal() == "${HOME}"


# ---- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given", "want"),
    [
        ("server.id", "a.b_c:d~e-F", "a.b_c:d~e-F"),
        ("server.ip_address", "2001:DB8::1", "2001:db8::1"),
        ("server.ip_address", "", None),
        ("server.capabilities.supported_languages", "en-US", "en-US"),
        ("server.capabilities.supported_languages", "en-US, de-DE", ("en-US", "de-DE")),
        ("server.capabilities.supported_languages", '["en-US"]', ("en-US",)),
        ("redis.tls", "Yes", True),
        ("redis.tls", "0", False),
        ("redis.password", "", Secret("")),
        ("redis.password", "with spaces, ü and 'quotes'", Secret("with spaces, ü and 'quotes'")),
        ("redis.username", "", None),
        ("redis.host", "::1", "::1"),
        ("redis.socket_timeout", "0.1", 0.1),
        ("control_plane.base_url", "HTTPS://cp.example:8443/api/", "HTTPS://cp.example:8443/api"),
        ("control_plane.base_url", "http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("control_plane.base_url", "http://[::1]:8080", "http://[::1]:8080"),
        ("control_plane.base_url", "http://localhost", "http://localhost"),
        ("control_plane.retry_attempts", "0", 0),
        ("control_plane.not_found_hold_seconds", "0", 0.0),
        ("streams.visibility_timeout", "1", 1.0),
        ("streams.claim_interval", "0.1", 0.1),
        ("streams.dead_retention_days", "0.5", 0.5),
        ("streams.dead_retention_days", "", None),
        ("monitoring.heartbeat_interval", " 1e1 ", 10.0),
        ("monitoring.command_poll_interval", ".25", 0.25),
        ("monitoring.metrics_port", "0", 0),
        ("monitoring.metrics_port", "65532", 65532),
        ("monitoring.metrics_auth.api_key", "m", Secret("m")),
        (
            "monitoring.metrics_auth.allow",
            "10.0.0.0/8, ::1/128,10.1.2.3",
            ("10.0.0.0/8", "::1/128", "10.1.2.3/32"),
        ),
        ("monitoring.metrics_auth.allow", '["10.0.0.0/8"]', ("10.0.0.0/8",)),
        ("monitoring.metrics_auth.allow", "", ()),
        ("monitoring.log_level", "warn", "WARNING"),
        ("monitoring.log_level", "Warning", "WARNING"),
        ("monitoring.log_level", "critical", "CRITICAL"),
        ("monitoring.log_format", "Console", "console"),
        ("shutdown.drain_seconds", "0", 0.0),
        ("commands.allow", "health_check", ("health_check",)),
        ("commands.allow", "", ()),
    ],
)
def test_the_environment_is_parsed(key: str, given: str, want: Any) -> None:
    got = value_of(load((), KEY | {variable(key): given}), key)
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize(
    ("key", "given", "want"),
    [
        ("redis.port", "7000", 7000),
        ("redis.port", '"7000"', 7000),
        ("redis.socket_timeout", "5", 5.0),
        ("redis.tls", "on", True),
        ("redis.username", "null", None),
        ("redis.password", "null", Secret("")),
        ("server.capabilities.supported_products", "[a, b]", ("a", "b")),
        ("server.capabilities.supported_products", "speech", "speech"),
        ("commands.allow", "[]", ()),
        ("commands.allow", "[health_check, health_check]", ("health_check",)),
        ("commands.allow", "health_check", ("health_check",)),
        ("streams.dead_retention_days", "30", 30.0),
    ],
)
def test_files_are_parsed(written: Any, key: str, given: str, want: Any) -> None:
    *sections, name = key.split(".")
    text = "".join(f"{section}: {{" for section in sections) + f"{name}: {given}" + "}" * len(sections)
    got = value_of(load([written(text)], KEY), key)
    assert got == want
    assert type(got) is type(want)


A_DAY = "86400"


@pytest.mark.parametrize(
    ("key", "given", "want"),
    [
        ("server.id", "..", "1 to 128 of the characters A-Z a-z 0-9 . _ : ~ -, got '..'"),
        ("server.id", "a/b", "1 to 128 of the characters A-Z a-z 0-9 . _ : ~ -, got 'a/b'"),
        ("server.id", "a\n", r"1 to 128 of the characters A-Z a-z 0-9 . _ : ~ -, got 'a\n'"),
        ("server.id", "", "1 to 128 of the characters A-Z a-z 0-9 . _ : ~ -, got nothing"),
        ("server.region", "a\x1b", r"text of 1 to 128 printable characters, got 'a\x1b'"),
        ("server.ip_address", "host", "an IP address, or null, got 'host'"),
        ("server.capabilities.max_concurrent_sessions", "0", "a whole number from 1 to 1000000, got '0'"),
        ("redis.host", "a b", "a host name or IP address, got 'a b'"),
        ("redis.port", "0", "a whole number from 1 to 65535, got '0'"),
        ("redis.port", "6379.5", "a whole number from 1 to 65535, got '6379.5'"),
        ("redis.port", "", "a whole number from 1 to 65535, got nothing"),
        ("redis.port", "1_000", "a whole number from 1 to 65535, got '1_000'"),
        ("redis.port", "9" * 5000, "a whole number from 1 to 65535, got '" + "9" * 119 + "…"),
        ("redis.tls", "maybe", "true or false, got 'maybe'"),
        ("redis.socket_timeout", "nan", f"seconds from 0.1 to {A_DAY}, got 'nan'"),
        ("redis.socket_timeout", "1e400", f"seconds from 0.1 to {A_DAY}, got '1e400'"),
        ("redis.socket_timeout", "30s", f"seconds from 0.1 to {A_DAY}, got '30s'"),
        ("streams.visibility_timeout", "0.9", f"seconds from 1 to {A_DAY}, got '0.9'"),
        ("streams.claim_interval", "0.01", f"seconds from 0.1 to {A_DAY}, got '0.01'"),
        ("streams.claim_interval", "-1", f"seconds from 0.1 to {A_DAY}, got '-1'"),
        ("streams.usage_records", "a b", "a key's name in Redis, got 'a b'"),
        ("control_plane.base_url", "cp.example", "a URL like https://host[:port][/prefix], got 'cp.example'"),
        ("control_plane.base_url", "ftp://cp", "a URL like https://host[:port][/prefix], got 'ftp://cp'"),
        ("control_plane.base_url", "https://", "a URL like https://host[:port][/prefix], got 'https://'"),
        (
            "control_plane.base_url",
            "https://a:0",
            "a URL like https://host[:port][/prefix], got 'https://a:0'",
        ),
        (
            "control_plane.base_url",
            "https://a:b",
            "a URL like https://host[:port][/prefix], got a text that is no URL",
        ),
        (
            "control_plane.base_url",
            "https://a/?q",
            "a URL like https://host[:port][/prefix], got 'https://a/?q'",
        ),
        (
            "control_plane.base_url",
            "https://user:pw@a",
            "a URL like https://host[:port][/prefix], got a URL with credentials in it",
        ),
        (
            "monitoring.metrics_port",
            "65533",
            "0, or a port with three more above it (up to 65532), got 65533",
        ),
        ("monitoring.health_check_port", "65536", "a whole number from 0 to 65535, got '65536'"),
        ("monitoring.health_check_port", "9090", "another port than monitoring.metrics_port, got 9090"),
        (
            "monitoring.metrics_auth.allow",
            "10.0.0.0/8,lan",
            "a list, each item a network like 10.0.0.0/8 or ::1/128, got 'lan'",
        ),
        (
            "monitoring.metrics_auth.allow",
            "10.0.0.1/8",
            "a list, each item a network like 10.0.0.0/8 or ::1/128, "
            "got '10.0.0.1/8' (bits are set behind the prefix)",
        ),
        (
            "monitoring.metrics_auth.allow",
            "[10.0.0.0/8",
            "a list, each item a network like 10.0.0.0/8 or ::1/128, got a text that is no JSON list",
        ),
        ("monitoring.log_level", "LOUD", "one of DEBUG, INFO, WARNING, ERROR, CRITICAL, got 'LOUD'"),
        ("monitoring.log_format", "xml", "one of json, console, log4j, got 'xml'"),
        (
            "commands.allow",
            "health_check,reboot",
            "a list, each item one of refresh_public_keys, health_check, get_metrics, got 'reboot'",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(key: str, given: str, want: str) -> None:
    assert faults(**{variable(key): given}) == [f"{key}: expected {want}"]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("redis: {port: null}", "redis.port: expected a whole number from 1 to 65535, got nothing"),
        ("redis: {port: true}", "redis.port: expected a whole number from 1 to 65535, got true"),
        ("redis: {port: 1.0}", "redis.port: expected a whole number from 1 to 65535, got 1.0"),
        ("redis: {port: [1]}", "redis.port: expected a whole number from 1 to 65535, got a list"),
        ("redis: {host: {a: 1}}", "redis.host: expected a host name or IP address, got a mapping"),
        ("server: {id: 001}", "server.id: expected 1 to 128 of the characters A-Z a-z 0-9 . _ : ~ -, got 1"),
        (
            "server: {region: 2026-01-01}",
            "server.region: expected text of 1 to 128 printable characters, got a date",
        ),
        (
            "redis: {socket_timeout: .nan}",
            f"redis.socket_timeout: expected seconds from 0.1 to {A_DAY}, got nan",
        ),
        (
            "redis: {socket_timeout: .inf}",
            f"redis.socket_timeout: expected seconds from 0.1 to {A_DAY}, got inf",
        ),
        (
            f"redis: {{socket_timeout: {10**400}}}",
            f"redis.socket_timeout: expected seconds from 0.1 to {A_DAY}, got 1{'0' * 119}…",
        ),
        (
            "redis: {password: 12345}",
            "redis.password: expected text (in quotes, when it looks like a number), "
            "got what YAML takes for no text",
        ),
        ("commands: {allow: null}", None),
        ("commands: {allow: [[health_check]]}", None),
    ],
)
def test_a_wrong_value_in_a_file_is_named_likewise(written: Any, text: str, want: str | None) -> None:
    (got,) = faults(written(text))
    if want is not None:
        assert got == want


def test_an_empty_api_key_is_a_fault() -> None:
    want = "control_plane.api_key: expected a key of printable ASCII characters, got nothing"
    for environ in ({}, {"CONTROL_PLANE_API_KEY": ""}, {"DATAPLANE_CONTROL_PLANE__API_KEY": ""}):
        with pytest.raises(ConfigError) as caught:
            load([EXAMPLE], environ)
        assert [str(fault) for fault in caught.value.faults] == [want]


@pytest.mark.parametrize(
    "host", ["cp.example", "10.0.0.1", "127.0.0.1.example", "localhost.example", "0.0.0.0"]
)
def test_plain_http_is_refused_beyond_loopback_unless_allowed(host: str) -> None:
    environ = {"DATAPLANE_CONTROL_PLANE__BASE_URL": f"http://{host}"}
    (got,) = faults(**environ)
    assert got == (
        "control_plane.base_url: expected https "
        "(plain http only to loopback, or with control_plane.allow_http), "
        f"got 'http://{host}'"
    )
    allowed = load((), KEY | environ | {"DATAPLANE_CONTROL_PLANE__ALLOW_HTTP": "true"})
    assert allowed.control_plane.base_url == f"http://{host}"


# ---- several keys together -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("streams", "want"),
    [
        (
            {"commands": "queue:usage_records"},
            ["streams.commands: expected another name than streams.usage_records"],
        ),
        (
            {"usage_records": "q", "commands": "{q}:dead"},
            ["streams.commands: expected another name than streams.usage_records and its side keys"],
        ),
        (
            {"usage_records": "a}b"},
            ["streams.usage_records: expected a name without braces, or with one hash tag"],
        ),
        (
            {"usage_records": "{}a"},
            ["streams.usage_records: expected a name without braces, or with one hash tag"],
        ),
    ],
)
def test_stream_names_must_be_usable_and_distinct(streams: dict[str, str], want: list[str]) -> None:
    got = faults(**{variable(f"streams.{key}"): name for key, name in streams.items()})
    assert len(got) == len(want)
    assert all(g.startswith(w) for g, w in zip(got, want, strict=True))


def test_on_a_cluster_quota_request_and_response_share_a_hash_tag() -> None:
    cluster = {"DATAPLANE_REDIS__CLUSTER": "true"}
    (got,) = faults(**cluster)
    assert got.startswith(
        "streams.quota_response: expected on a cluster, the hash tag of streams.quota_refresh"
    )
    names = {
        "DATAPLANE_STREAMS__QUOTA_REFRESH": "{quota}:request",
        "DATAPLANE_STREAMS__QUOTA_RESPONSE": "{quota}:response",
    }
    assert load((), KEY | cluster | names).redis.cluster is True
    assert faults(**cluster, **names, DATAPLANE_REDIS__DB="1") == [
        "redis.db: expected 0, the only database of a cluster, got 1"
    ]


@pytest.mark.parametrize("section", ["redis", "control_plane", "monitoring.metrics_tls"])
def test_a_certificate_and_its_key_come_together_and_exist(section: str, tmp_path: Path) -> None:
    cert, key = variable(f"{section}.cert_file"), variable(f"{section}.key_file")
    assert faults(**{cert: str(EXAMPLE)}) == [
        f"{section}.key_file: expected the file that belongs to {section}.cert_file, got nothing"
    ]
    assert faults(**{key: str(EXAMPLE)}) == [
        f"{section}.cert_file: expected the file that belongs to {section}.key_file, got nothing"
    ]
    assert faults(**{cert: str(EXAMPLE), key: str(tmp_path / "gone")}) == [
        f"{section}.key_file: expected a readable file, got No such file or directory"
    ]
    assert faults(**{cert: str(tmp_path), key: str(EXAMPLE)}) == [
        f"{section}.cert_file: expected a readable file, got Is a directory"
    ]
    assert value_of(load((), KEY | {cert: str(EXAMPLE), key: str(EXAMPLE)}), section).key_file == str(EXAMPLE)


# ---- unknown keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("redis: {pasword: x}", "redis.pasword", " (nearest: redis.password)"),
        ("rediss: {host: x}", "rediss", " (nearest: redis)"),
        ("log_level: INFO", "log_level", " (nearest: monitoring.log_level)"),
        (
            "monitoring: {metrics_auth: {key: x}}",
            "monitoring.metrics_auth.key",
            " (nearest: monitoring.metrics_auth.api_key)",
        ),
        ("zzzzzz: 1", "zzzzzz", ""),
        ("1: 1", "1", ""),
    ],
)
def test_an_unknown_key_is_a_fault_with_the_nearest_known(
    written: Any, text: str, key: str, nearest: str
) -> None:
    file = written(text)
    assert faults(file) == [f"{key}: expected a key that exists{nearest}, got an unknown one in {file}"]


def test_a_key_with_a_dot_is_no_section(written: Any) -> None:
    file = written("redis.host: x")
    assert faults(file) == [f"redis.host: expected a key within its section, got one with a dot in {file}"]


@pytest.mark.parametrize("text", ["redis: x", "redis: [1]", "redis: 1", "monitoring: {metrics_auth: x}"])
def test_a_section_that_is_no_mapping_is_a_fault(written: Any, text: str) -> None:
    (got,) = faults(written(text))
    assert ": expected a mapping, got a " in got


def test_an_unknown_variable_with_a_section_is_a_fault_with_the_nearest_known() -> None:
    assert faults(DATAPLANE_REDIS__PASWORD="x") == [
        "DATAPLANE_REDIS__PASWORD: expected a variable that exists (nearest: DATAPLANE_REDIS__PASSWORD), "
        "got an unknown one"
    ]


def test_a_variable_without_a_section_is_somebody_elses_unless_an_underscore_is_missing() -> None:
    environ = {
        "DATAPLANE_AGENT_SERVICE_HOST": "10.0.0.1",
        "DATAPLANE_HOME": "/x",
        "DATAPLANE_REDIS_HOST": "r",
    }
    assert load((), KEY | environ).warnings == (
        "DATAPLANE_REDIS_HOST is not read: the variable's name is DATAPLANE_REDIS__HOST",
    )


def test_every_fault_is_reported_at_once(written: Any) -> None:
    first = written("redis: {port: x, hots: y}", "one.yaml")
    second = written("redis: {db: z}", "two.yaml")
    with pytest.raises(ConfigError) as caught:
        load([first, second, Path("gone.yaml")], {"DATAPLANE_MONITORING__LOG_LEVEL": "loud"})
    assert {fault.key for fault in caught.value.faults} == {
        "redis.hots",
        "gone.yaml",
        "redis.port",
        "redis.db",
        "control_plane.api_key",
        "monitoring.log_level",
    }
    assert str(caught.value).splitlines() == [str(fault) for fault in caught.value.faults]


# ---- files that are none ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "want"),
    [
        (b"redis: [", "a YAML file with a mapping of sections, got "),
        (b"redis:\n  host: a\n port: 1\n", "a YAML file with a mapping of sections, got "),
        (b"- a\n- b\n", "a YAML file with a mapping of sections, got a list"),
        (b"just text", "a YAML file with a mapping of sections, got a str"),
        (b"a: 1\n---\nb: 2\n", "a YAML file with a mapping of sections, got "),
        (b"\xff\xfe\x00", "a YAML file with a mapping of sections, got "),
        (b"a: !!python/object:os.system x", "a YAML file with a mapping of sections, got "),
        (b"a: 2026-13-45", "a YAML file with a mapping of sections, got what YAML cannot read (ValueError)"),
        (b"? [a]\n: b\n", "a YAML file with a mapping of sections, got "),
        (b"[" * 5_000, "a YAML file with a mapping of sections, got mappings or lists nested too deeply"),
        (
            b"#" * (config.MAX_FILE_BYTES + 1),
            f"a YAML file with a mapping of sections, got more than {config.MAX_FILE_BYTES} bytes",
        ),
        (
            b"redis:\n  host: a\n  port: 1\n  host: b\n",
            "a YAML file with a mapping of sections, got the key 'host' a second time in line 4",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_one_fault(written: Any, content: bytes, want: str) -> None:
    file = written(content)
    (got,) = faults(file)
    assert got.startswith(f"{file}: expected {want}")


def test_a_file_that_is_missing_is_a_fault_that_names_it(tmp_path: Path) -> None:
    assert faults(tmp_path / "gone") == [
        f"{tmp_path}/gone: expected a readable file, got No such file or directory"
    ]
    assert faults(tmp_path) == [f"{tmp_path}: expected a readable file, got Is a directory"]
    assert faults(DATAPLANE_REDIS__HOST_FILE=str(tmp_path / "gone")) == [
        "DATAPLANE_REDIS__HOST_FILE: expected a readable file, got No such file or directory"
    ]


def test_a_file_of_one_value_must_be_short_text(written: Any) -> None:
    most = f"a text file of at most {config.MAX_VALUE_BYTES} bytes"
    want = f"DATAPLANE_REDIS__HOST_FILE: expected {most}, got something else"
    assert faults(DATAPLANE_REDIS__HOST_FILE=str(written(b"\xff"))) == [want]
    assert faults(DATAPLANE_REDIS__HOST_FILE=str(written(b"a" * 70_000))) == [want]


def test_aliases_of_aliases_cost_nothing(written: Any) -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    assert len(faults(written("\n".join([*lines, "commands: {allow: *a19}"])))) == 21


# ---- warnings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "want"),
    [
        ({"DATAPLANE_REDIS__RETRY_ON_TIMEOUT": "true"}, "redis.retry_on_timeout is ignored"),
        ({"DATAPLANE_CONTROL_PLANE__RETRY_ATTEMPTS": "5"}, "control_plane.retry_attempts: 2 is used"),
        (
            {"DATAPLANE_MONITORING__LOG_FORMAT": "log4j"},
            "monitoring.log_format log4j: this release does not have it",
        ),
        (
            {"DATAPLANE_MONITORING__LOG_DIR": "/var/log/x"},
            "monitoring.log_dir: this release does not have it",
        ),
        (
            {"DATAPLANE_MONITORING__AUDIT_DIR": "/var/log/x"},
            "monitoring.audit_dir: this release does not have it",
        ),
        (
            {"DATAPLANE_MONITORING__PUSHGATEWAY__URL": "http://p:9091"},
            "monitoring.pushgateway.url: this release",
        ),
        (
            {
                "DATAPLANE_MONITORING__METRICS_TLS__CERT_FILE": str(EXAMPLE),
                "DATAPLANE_MONITORING__METRICS_TLS__KEY_FILE": str(EXAMPLE),
            },
            "monitoring.metrics_tls: this release does not have it",
        ),
        (
            {
                "DATAPLANE_REDIS__CLUSTER": "true",
                "DATAPLANE_STREAMS__QUOTA_REFRESH": "{q}:a",
                "DATAPLANE_STREAMS__QUOTA_RESPONSE": "{q}:b",
            },
            "redis.cluster: this release does not have it",
        ),
        ({"DATAPLANE_MONITORING__HEALTH_CHECK_PORT": "9092"}, "monitoring.metrics_port 9090 and"),
        ({"DATAPLANE_REDIS__CA_FILE": str(EXAMPLE)}, "redis.ca_file has no effect: redis.tls is false"),
        (
            {
                "DATAPLANE_CONTROL_PLANE__CA_FILE": str(EXAMPLE),
                "DATAPLANE_CONTROL_PLANE__BASE_URL": "http://localhost",
            },
            "control_plane.ca_file has no effect: the URL is plain http",
        ),
    ],
)
def test_what_has_no_effect_is_said(environ: dict[str, str], want: str) -> None:
    (got,) = load((), KEY | environ).warnings
    assert got.startswith(want)


def test_more_than_two_quick_retries_become_two(written: Any) -> None:
    file = written("control_plane: {retry_attempts: 7}\nredis: {retry_on_timeout: true}")
    loaded = load([file], KEY)
    assert loaded.control_plane.retry_attempts == 2
    assert loaded.warnings == (
        "redis.retry_on_timeout is ignored: what times out is always tried again",
        "control_plane.retry_attempts: 2 is used, 7 is more than the most",
    )


# ---- secrets ---------------------------------------------------------------------------------------------


def test_a_secret_shows_itself_to_nobody() -> None:
    secret = Secret("hunter2")
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret:>20}",
        "".join(map(str, [secret])),
        repr([secret]),
        ascii(secret),
    ]
    assert shown == ["***"] * 5 + ["[***]", "***"]
    assert secret.reveal() == "hunter2"
    assert secret
    assert not Secret("")
    assert not hasattr(secret, "__dict__")
    with pytest.raises(TypeError):
        msgspec.json.encode(secret)


def test_a_secret_survives_copies() -> None:
    secret = Secret("hunter2", "/some/file")
    for other in (copy.copy(secret), copy.deepcopy(secret), pickle.loads(pickle.dumps(secret))):
        assert other == secret
        assert hash(other) == hash(secret)
    assert secret != Secret("other")
    assert secret != "hunter2"


def test_a_secret_from_a_file_follows_its_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("one\n")
    secret = load((), {"DATAPLANE_CONTROL_PLANE__API_KEY_FILE": str(file)}).control_plane.api_key
    for content, changed, want in [
        ("one\n", False, "one"),
        ("two\n", True, "two"),
        ("", False, "two"),
        ("half\x00", False, "two"),
        ("three", True, "three"),
    ]:
        file.write_text(content)
        assert (secret.reload(), secret.reveal()) == (changed, want)
    file.unlink()
    assert (secret.reload(), secret.reveal()) == (False, "three")
    assert Secret("literal").reload() is False


def test_no_secret_is_in_the_effective_configuration_or_its_repr() -> None:
    environ = {
        "DATAPLANE_REDIS__PASSWORD": "hunter2",
        "DATAPLANE_MONITORING__METRICS_AUTH__API_KEY": "hunter3",
    }
    loaded = load((), {"CONTROL_PLANE_API_KEY": "hunter1"} | environ)
    assert [secret.reveal() for secret in loaded.secrets] == ["hunter2", "hunter1", "hunter3"]
    shown = effective(loaded)
    assert "hunter" not in repr(loaded) + repr(shown)
    assert shown["redis"]["password"] == shown["control_plane"]["api_key"] == "***"
    assert effective(load((), KEY))["redis"]["password"] is None
    assert effective(Config())["shutdown"] == {"drain_seconds": 8}


@pytest.mark.parametrize(
    "environ",
    [
        {"DATAPLANE_CONTROL_PLANE__API_KEY": "hunter2 with-space"},
        {"DATAPLANE_CONTROL_PLANE__API_KEY": "hunter2\nInjected: header"},
        {"DATAPLANE_CONTROL_PLANE__API_KEY": "hunter2ü"},
        {"DATAPLANE_REDIS__PASSWORD": "hunter2\udcff"},
        {"DATAPLANE_REDIS__PASWORD": "hunter2"},
        {"DATAPLANE_CONTROL_PLANE__BASE_URL": "https://user:hunter2@cp"},
        {"CONTROL_PLANE_API_KEY": "hunter2", "DATAPLANE_MONITORING__LOG_LEVEL": "hunter2"},
        {"CONTROL_PLANE_API_KEY": "hunter2" * 30, "DATAPLANE_REDIS__PORT": "hunter2" * 30},
        {"CONTROL_PLANE_API_KEY": "hunter2'\"\\", "DATAPLANE_REDIS__PORT": "hunter2'\"\\"},
    ],
)
def test_no_fault_shows_a_secret(environ: dict[str, str]) -> None:
    assert "hunter" not in "".join(faults(**environ))


@pytest.mark.parametrize(
    "text",
    [
        "redis: {password: [hunter2]}",
        "redis: {password: {hunter2: 1}}",
        "redis: {pasword: hunter2}",
        "redis: hunter2",
        "control_plane:\n  api_key: hunter2\n bad: indent",
        'control_plane: {api_key: "hunter2}',
        "control_plane: {api_key: hunter2, timeout: hunter2}",
        "control_plane: {api_key: 'hunter2${'}",
    ],
)
def test_no_fault_of_a_file_shows_a_secret(written: Any, text: str) -> None:
    assert "hunter" not in "".join(faults(written(text)))


# ---- cost ------------------------------------------------------------------------------------------------


def test_importing_it_brings_no_yaml_and_no_operators_libraries() -> None:
    code = (
        "import sys, common.config; print(*sorted({'yaml', 'rich', 'difflib', 'httpx'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "\n"
    )
