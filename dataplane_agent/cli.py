"""The command line: which commands there are, and which exit code every end has.

    0  well                        2  wrong usage or configuration
    1  found something wrong       3  cannot reach Redis or the ControlPlane

An expected failure is one line (a configuration: one line a fault) on standard error, never a traceback.
"""

from __future__ import annotations

import asyncio
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cyclopts import App, CycloptsError

from common.config import ConfigError
from common.redis_border import Away, Denied, GroupGone, RedisFault
from dataplane_agent.target import Failure

WELL, WRONG, USAGE, UNREACHABLE = 0, 1, 2, 3
INTERRUPTED = 130
BROKEN_PIPE = 141


def release() -> str:
    """The installed release."""
    try:
        return version("dataplane-agent")
    except PackageNotFoundError:
        return "unknown"


app = App(
    name="dataplane",
    help="Runs the DataPlaneAgent, shows how it is, and decides about its dead letters.",
    version=release,
    help_format="plaintext",
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
dead = App(name="dead", help="The dead letters: what died of what, and the two ways out.")
config = App(name="config", help="The configuration: is it right, and where does each value come from?")
send = App(name="send", help="Puts an entry on a stream by hand.")

app.command(dead)
app.command(config)
app.command(send)

# Named, not imported: a command loads its own libraries only.
app.command(
    "dataplane_agent.demo:demo", name="demo", help="Shows the whole thing on this machine, and reconciles."
)
app.command("dataplane_agent.run:run", name="run", help="Runs the services in the foreground.")
app.command("dataplane_agent.status:status", name="status", help="Shows streams, services and ledger.")
dead.command("dataplane_agent.dead:list_", name="list")
dead.command("dataplane_agent.dead:show", name="show")
dead.command("dataplane_agent.dead:retry", name="retry")
dead.command("dataplane_agent.dead:discard", name="discard")
config.command("dataplane_agent.config_cmd:check", name="check")
config.command("dataplane_agent.config_cmd:show", name="show")
send.command("dataplane_agent.send:usage", name="usage")
send.command("dataplane_agent.send:start", name="start")
send.command("dataplane_agent.send:complete", name="complete")
send.command("dataplane_agent.send:quota", name="quota")

COMMANDS = ("demo", "run", "status", "dead", "config", "send", "--help", "-h", "--version")


def call(tokens: list[str]) -> int:
    """Runs one command line and says its exit code."""
    try:
        result = app(tokens)
        sys.stdout.flush()
    except CycloptsError as error:
        return _say(str(error), USAGE)
    except ConfigError as error:
        return _say("\n".join(str(fault) for fault in error.faults), USAGE)
    except Failure as failure:
        return _say(str(failure), failure.code)
    except (Away, Denied) as fault:
        return _say(f"cannot reach Redis: {fault}", UNREACHABLE)
    except GroupGone as fault:
        return _say(str(fault), WRONG)
    except RedisFault as fault:
        return _say(f"Redis refused: {fault}", WRONG)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    except BrokenPipeError:  # `dataplane dead list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return _code(result)


def _code(result: Any) -> int:
    return result if isinstance(result, int) else WELL


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code
