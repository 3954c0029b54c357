"""An in-process Redis that follows the virtual clock: fakeredis' data, with the agent's own scripts run as they are.

One command after another, at once and undivided, as a real server does; no connection, no thread.
Where fakeredis differs from the real servers in what the agent uses, it is put right here, each difference with
its reason; `tests/integration/test_fake_redis.py` holds the two side by side.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import lupa.lua51 as lua_module  # type: ignore[import-untyped]
import redis.exceptions as errors
from fakeredis import _msgs as msgs
from fakeredis._command_args_parsing import extract_args
from fakeredis._commands import COMMANDS_WITH_SUB, Signature, command
from fakeredis._core import CommandItem, FakeServer
from fakeredis._helpers import SimpleError, SimpleString, current_time
from fakeredis._socket._fakesocket import FakeSocket
from fakeredis._socket._resp import convert_to_resp2
from fakeredis.model import XStream
from fakeredis.model._stream import StreamEntryKey, StreamGroup
from redis.client import Redis as _ParsesErrors
from redis.connection import DefaultParser

Reply = Any

VERSION = (7, 0, 15)


class Group(StreamGroup):
    """A group as the real servers keep it."""

    def _calc_consumer_last_time(self) -> None:
        """Nothing: when a consumer was last seen is set where it is seen, not worked out from what is pending."""


class Server:
    """The data of one Redis."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._fake = FakeServer(version=VERSION, server_type="redis")
        self._socket = _Socket(self._fake, 0, client_class=_ParsesErrors, client_info={})
        self._database = self._fake.dbs[0]
        self._database.notify_watch = lambda key: None  # type: ignore[method-assign]  # nobody watches, no lock is held

    def execute(self, *command: bytes | str | int | float) -> Reply:
        """The reply; an error reply is raised as redis-py has it."""
        name, args = _split([_encoded(word) for word in command])
        self._database.time = self._wall()
        function, signature = self._socket._name_to_func(name)
        try:
            signature.check_arity(args, VERSION)
            reply = self._socket._run_command(function, signature, args, False)
        except SimpleError as error:
            reply = error
        return _decoded(reply)

    def stream(self, name: str) -> XStream | None:
        """The stream itself, for those who watch; None where there is none."""
        item = self._database.get(name.encode())
        return item.value if item is not None and isinstance(item.value, XStream) else None

    def forget_scripts(self) -> None:
        self._fake.script_cache.clear()


def _split(words: list[bytes]) -> tuple[str, list[bytes]]:
    """The name of a command, its subcommand included, and its arguments."""
    name = _name(words[0])
    return (f"{name} {_name(words[1])}", words[2:]) if name in COMMANDS_WITH_SUB else (name, words[1:])


@cache
def _name(word: bytes) -> str:
    return word.decode().lower()


def _encoded(word: bytes | str | int | float) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


_parser = DefaultParser(socket_read_size=65536)


def _decoded(reply: Any) -> Reply:
    if isinstance(reply, SimpleError):
        error = _parser.parse_error(reply.value)  # type: ignore[no-untyped-call]
        assert isinstance(error, errors.RedisError)
        raise error
    if isinstance(reply, SimpleString):
        return reply.value
    if isinstance(reply, list):
        return [_decoded(part) for part in reply]
    return reply


# -- Lua: one interpreter for all servers of this process, each script compiled once ------------------------


class _Interpreter:
    """Runs scripts on behalf of one socket at a time."""

    def __init__(self) -> None:
        self._lua = lua_module.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        self._chunks: dict[bytes, Any] = {}
        self.socket: _Socket | None = None
        self._commands: dict[tuple[bytes, bytes | None], tuple[Any, Any, int]] = {}
        self._lua.execute(b"""
            function make_redis(call, pcall, decode)
                redis = {call = call, pcall = pcall}
                cjson = {decode = decode}
                redis.error_reply = function(text) return {err = text} end
                redis.status_reply = function(text) return {ok = text} end
            end
        """)
        self._lua.globals()[b"make_redis"](self._call, self._pcall, self._decode)
        self.table = self._lua.table_from

    def run(self, script: bytes, keys: Sequence[bytes], args: Sequence[bytes]) -> Any:
        chunk = self._chunks.get(script)
        if chunk is None:
            # KEYS and ARGV as parameters instead of globals: nothing to set before each run.
            chunk = self._chunks[script] = self._lua.execute(
                b"return function(KEYS, ARGV) " + script + b"\nend"
            )
        return chunk(self.table(keys), self.table(args))

    def _call(self, *command: Any) -> Any:
        socket = self.socket
        assert socket is not None
        name, args = _split([_lua_argument(word) for word in command])
        function, signature = socket._name_to_func(name)
        return self._to_lua(socket._run_command(function, signature, args, True))

    def _pcall(self, *command: Any) -> Any:
        try:
            return self._call(*command)
        except SimpleError as error:
            return self.table({b"err": error.value.encode()})

    def _decode(self, text: bytes) -> Any:
        """cjson.decode, for what our scripts are told: null is left out."""
        return self._table_of(json.loads(text))

    def _table_of(self, value: Any) -> Any:
        if isinstance(value, dict):
            members = {name.encode(): self._table_of(member) for name, member in value.items()}
            return self.table({name: member for name, member in members.items() if member is not None})
        if isinstance(value, list):
            return self.table([self._table_of(member) for member in value])
        return value.encode() if isinstance(value, str) else value

    def _to_lua(self, reply: Any) -> Any:
        kind = type(reply)
        if kind is bytes or kind is int:
            return reply
        if reply is None:
            return False
        if kind is list:
            return self.table([self._to_lua(part) for part in reply])
        if isinstance(reply, SimpleString):
            return self.table({b"ok": reply.value})
        if isinstance(reply, SimpleError):
            raise reply
        raise AssertionError(f"no such reply: {kind}")


def _lua_argument(word: Any) -> bytes:
    if type(word) is bytes:
        return word
    if type(word) is int or type(word) is float:
        return b"%.17g" % word
    raise SimpleError("ERR Lua redis lib command arguments must be strings or integers")


_lua = _Interpreter()


class _Socket(FakeSocket):
    """The commands, with what fakeredis does otherwise than the real servers put right."""

    def _run_command(
        self, func: Callable[..., Any] | None, sig: Signature, args: list[Any], from_script: bool
    ) -> Any:
        """As fakeredis has it, without what only its other servers, watchers and RESP3 need."""
        assert func is not None
        keys: list[CommandItem] = []
        try:
            applied = sig.apply(args, self._db, VERSION)
            if len(applied) == 1:
                return applied[0]
            arguments, keys = applied
            reply = func(*arguments)
            if isinstance(reply, dict | list):
                reply = convert_to_resp2(reply)
        except SimpleError as error:
            reply = error
        keep_empty = msgs.FLAG_LEAVE_EMPTY_VAL in sig.flags
        for key in keys:
            key.writeback(remove_empty_val=not keep_empty)
        return reply

    def eval(self, script: bytes, numkeys: int, *keys_and_args: bytes) -> Any:
        self._server.script_cache[hashlib.sha1(script).hexdigest().encode()] = script
        return self._run_script(script, numkeys, keys_and_args)

    def evalsha(self, sha1: bytes, numkeys: int, *keys_and_args: bytes) -> Any:
        script = self._server.script_cache.get(sha1)
        if script is None:
            raise SimpleError(msgs.NO_MATCHING_SCRIPT_MSG)
        return self._run_script(script, numkeys, keys_and_args)

    def _run_script(self, script: bytes, keys: int, keys_and_args: tuple[bytes, ...]) -> Any:
        """An error of a command ends the script, as in Redis 7; what was written before it stays."""
        _lua.socket, self._script_resp = self, 2
        try:
            result = _lua.run(script, keys_and_args[:keys], keys_and_args[keys:])
        except lua_module.LuaError as error:
            raise SimpleError(f"ERR {error}") from error
        finally:
            self._script_resp = None
        return self._convert_lua_result(result, nested=False)

    def xautoclaim(
        self,
        key: CommandItem,
        group_name: bytes,
        consumer_name: bytes,
        min_idle_ms: int,
        start: bytes,
        *args: bytes,
    ) -> Any:
        """What was deleted is reported however short a time it was idle, and counts as a claimed one does."""
        stream = key.value
        group = stream.group_get(group_name) if stream is not None else None
        if group is None:
            raise SimpleError(msgs.XNACK_NOGROUP_MSG.format(key.key.decode(), group_name.decode()))
        (count, justid), _ = extract_args(args, ("+count", "justid"))
        room, attempts = count or 100, 10 * (count or 100)
        first, now = StreamEntryKey.parse_str(start), current_time()
        waiting = deque(sorted(entry for entry in group.pel if entry >= first))
        claimed: list[StreamEntryKey] = []
        deleted: list[StreamEntryKey] = []
        while waiting and room and attempts:
            entry = waiting.popleft()
            attempts -= 1
            if entry not in stream:
                group.ack((entry.encode(),))
                deleted.append(entry)
                room -= 1
            elif now - group.pel[entry].time_read >= min_idle_ms:
                group.claim(min_idle_ms, [entry], consumer_name, None, False, justid=bool(justid))
                claimed.append(entry)
                room -= 1
        return [
            waiting[0].encode() if waiting else b"0-0",
            [entry.encode() if justid else stream.format_record(entry) for entry in claimed],
            [entry.encode() for entry in deleted],
        ]

    @command(name="info", fixed=(), repeat=(bytes,))
    def info(self, *sections: bytes) -> bytes:
        """As much of it as is asked for here: which run of the server this is."""
        return b"# Server\r\nrun_id:%040x\r\n" % 1

    def xread(self, *args: bytes) -> Any:
        """Nothing to read is a nil, not an empty list."""
        return super().xread(*args) or None


def _add_group(
    self: XStream, name: bytes, last_delivered_key: StreamEntryKey, entries_read: int | None
) -> None:
    self._groups[name] = Group(self, name, last_delivered_key, entries_read)


XStream.group_add = _add_group  # type: ignore[method-assign]
