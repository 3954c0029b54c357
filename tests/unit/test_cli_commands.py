"""The command line: what is taken for what, and which exit code follows."""

from __future__ import annotations

import pytest
import yaml

from common import config
from dataplane_agent import __main__ as entry
from dataplane_agent import config_cmd, run, status
from dataplane_agent.cli import call

KEY = {"DATAPLANE_CONTROL_PLANE__API_KEY": "very-secret"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ([], ["run"]),
        (["usage_forwarder"], ["run", "usage_forwarder"]),
        (["--config", "a.yaml"], ["run", "--config", "a.yaml"]),
        (["status", "--json"], ["status", "--json"]),
        (["--version"], ["--version"]),
        (["--check-config"], ["config", "check"]),
        (["--validate-config", "--config", "a.yaml"], ["config", "check", "--config", "a.yaml"]),
        (["run", "--config", "a.yaml", "--check-config"], ["config", "check", "--config", "a.yaml"]),
        (["--config", "a.yaml", "status"], ["status", "--config", "a.yaml"]),
        (["--config", "a.yaml", "usage_forwarder"], ["run", "usage_forwarder", "--config", "a.yaml"]),
    ],
)
def test_the_module_runs_what_names_no_command(typed: list[str], meant: list[str]) -> None:
    assert entry.module_command(typed) == meant


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (
            ["--config", "a.yaml", "--config=b.yaml", "dead", "list", "--config", "c.yaml", "--json"],
            ["dead", "list", "--config", "a.yaml", "--config=b.yaml", "--config", "c.yaml", "--json"],
        ),
        (["--config", "a.yaml", "dead", "show", "1-0"], ["dead", "show", "1-0", "--config", "a.yaml"]),
        (["--config"], ["--config"]),
        (["status"], ["status"]),
        ([], []),
    ],
)
def test_a_file_before_the_command_counts_as_one_behind_it_and_comes_first(
    typed: list[str], meant: list[str]
) -> None:
    assert entry.command(typed) == meant


@pytest.mark.parametrize(
    "typed",
    [
        ["nonsense"],
        ["status", "--nonsense"],
        ["status", "extra"],
        ["dead", "list", "--reason", "boredom"],
        ["dead", "list", "--older-than", "long"],
        ["dead", "list", "--limit", "many"],
        ["send", "usage", "--session", "s"],
        ["pending", "queue:usage_records"],
        ["doctor"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(typed) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1


@pytest.mark.parametrize(
    "typed", [[], ["dead"], ["config"], ["send"], ["--help"], ["dead", "retry", "--help"]]
)
def test_asking_what_there_is_ends_well(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(typed) == 0
    assert "Usage: dataplane" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "run", "status", "dead", "config", "send"])
def test_the_help_says_a_sentence_about_every_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call([])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line[2:].startswith(f"{command} ")]
    assert len(line.split()) > 4


def test_every_configuration_fault_is_told_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATAPLANE_REDIS__PORT", "many")
    monkeypatch.delenv("DATAPLANE_CONTROL_PLANE__API_KEY", raising=False)
    assert call(["config", "check"]) == 2
    faults = capsys.readouterr().err.splitlines()
    assert [fault.split(":")[0] for fault in faults] == ["control_plane.api_key", "redis.port"]


def test_the_shown_configuration_is_one_that_a_file_could_say() -> None:
    settings = config.load((), KEY)
    shown = "\n".join(config_cmd.yaml(config.effective(settings), settings.origins))
    assert yaml.safe_load(shown) == config.effective(settings)
    assert "very-secret" not in shown
    assert "port: 6379  # default" in shown
    assert 'api_key: "***"  # environment DATAPLANE_CONTROL_PLANE__API_KEY' in shown


def test_the_supervisor_gets_the_same_command_line() -> None:
    line = run.command(("registrar",), ("usage_forwarder=2",), ["a.yaml", "b.yaml"])
    assert line[1:] == [
        "-P",
        "-m",
        "dataplane_agent.supervisor",
        "--replicas",
        "usage_forwarder=2",
        "--config",
        "a.yaml",
        "--config",
        "b.yaml",
        "registrar",
    ]


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ([], "missing"),
        (["healthy"], "healthy"),
        (["healthy", "healthy"], "healthy"),
        (["healthy", "unhealthy"], "degraded"),
        (["unhealthy"], "unhealthy"),
        (["degraded", "degraded"], "degraded"),
    ],
)
def test_a_service_is_what_its_processes_are(statuses: list[str], said: str) -> None:
    assert status.overall(statuses) == said
