"""The registrar as a process: speaks with the ControlPlane for all four services of one server."""

from __future__ import annotations

import sys

from common import service, streams
from common.service import Running, Service
from common.streams import Stream
from common.turn import Turn
from registrar import carrying_out
from registrar.commands import CommandHandler, CommandPoll
from registrar.heartbeat import Heartbeat
from registrar.memory import Memory
from registrar.overview import Overview
from registrar.public_keys import PublicKeys
from registrar.registration import Registration
from registrar.shutdown import Farewell


def build(running: Running) -> Service:
    """Everything a registrar does beside its stream belongs to the one that has the turn."""
    server_id, names, scripts = running.config.server.id, running.config.streams, running.scripts
    commands = Stream(names.commands, "registrar")
    all_four = [
        Stream(names.usage_records, "usage_forwarder"),
        Stream(names.session_lifecycle, "session_notifier"),
        Stream(names.quota_refresh, "quota_refresher"),
        commands,
    ]

    turn = Turn(
        scripts,
        streams.registrar_turn_key(server_id),
        running.consumer_name,
        names.visibility_timeout,
        clock=running.clock,
    )
    overview = Overview(running.redis, server_id)
    memory = Memory(scripts, server_id)
    public_keys = PublicKeys(running)
    registration = Registration(running, turn)
    heartbeat = Heartbeat(running, turn, registration, overview)
    poll = CommandPoll(running, turn, memory)
    runs = carrying_out.runs(public_keys.keys, overview, scripts, all_four)
    farewell = Farewell(running, turn, registration)

    return Service(
        stream=commands,
        handler=CommandHandler(running, public_keys.keys, memory, runs),
        children={
            "registrar_turn": farewell.keep_turn,
            "overview": lambda: overview.run(running),
            "registration": registration.run,
            "heartbeat": heartbeat.run,
            "public_keys": lambda: public_keys.run(turn, heartbeat),
            "command_poll": lambda: poll.run(registration, heartbeat),
        },
        last_words=farewell.say,
        services_status=overview.services,
    )


def main() -> int:
    return service.run("registrar", build)


if __name__ == "__main__":
    sys.exit(main())
