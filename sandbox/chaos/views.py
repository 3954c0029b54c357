"""Where an entry is, seen in one instant: not read yet, pending, dead. Every entry is in exactly one view.

stray    read, and in no view: nobody will ever deliver it
double   in two views
ghost    in a view, but gone from the stream (somebody deleted it)
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from redis.asyncio import Redis

from common.streams import Stream

Place = Literal["unread", "pending", "dead"]

_PLACE = """
local stream, group, twin = KEYS[1], ARGV[1], ARGV[2]
local last = {0, 0}
if redis.call('EXISTS', stream) == 0 then return {} end
local function numbers(id)
  local ms, seq = string.match(id, '^(%d+)%-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
local groups = {}
for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
  local named = {}
  for i = 1, #info, 2 do named[info[i]] = info[i + 1] end
  groups[named.name] = named
end
if groups[group] then last = {numbers(groups[group]['last-delivered-id'])} end
local function unread(id)
  local ms, seq = numbers(id)
  return ms > last[1] or (ms == last[1] and seq > last[2])
end
local function pending(name, from, to)
  if not groups[name] then return {} end
  return redis.call('XPENDING', stream, name, from or '-', to or '+', 1000000)
end
"""

_EXAMINE = (
    _PLACE
    + """
local live, dead, there, reply = {}, {}, {}, {{}, {}, {}}
for _, row in ipairs(redis.call('XRANGE', stream, '-', '+')) do there[row[1]] = true end
for _, row in ipairs(pending(group)) do
  live[row[1]] = true
  if not there[row[1]] then table.insert(reply[3], row[1]) end
end
for _, row in ipairs(pending(twin)) do
  dead[row[1]] = true
  if live[row[1]] then table.insert(reply[2], row[1]) end
  if not there[row[1]] then table.insert(reply[3], row[1]) end
end
for id in pairs(there) do
  if not live[id] and not dead[id] and not unread(id) then table.insert(reply[1], id) end
end
return reply
"""
)

# ARGV 3 'pending', 'dead', 'all'; 4 at most; 5 'XDEL' or 'XTRIM'. XTRIM takes the oldest, wherever they are.
_REMOVE = (
    _PLACE
    + """
local wanted, most = ARGV[3], tonumber(ARGV[4])
local ids, reply = {}, {}
if wanted == 'all' then
  for _, row in ipairs(redis.call('XRANGE', stream, '-', '+', 'COUNT', most)) do ids[#ids + 1] = row[1] end
else
  for _, row in ipairs(pending(wanted == 'pending' and group or twin)) do
    if #ids < most and #redis.call('XRANGE', stream, row[1], row[1]) == 1 then ids[#ids + 1] = row[1] end
  end
end
for _, id in ipairs(ids) do
  local place = unread(id) and 'unread' or 'pending'
  if #pending(twin, id, id) > 0 then place = 'dead' end
  reply[#reply + 1] = {id, place}
  if wanted ~= 'all' then redis.call('XDEL', stream, id) end
end
if wanted == 'all' and #ids > 0 then
  redis.call('XTRIM', stream, 'MAXLEN', redis.call('XLEN', stream) - #ids)
end
return reply
"""
)


class Oddities(msgspec.Struct, frozen=True):
    """Entry ids of one stream that are not in exactly one view."""

    strays: list[str] = []
    doubles: list[str] = []
    ghosts: list[str] = []


async def examine(redis: Redis, stream: Stream) -> Oddities:
    """Looks at one stream, as of one instant."""
    reply = await _run(redis, _EXAMINE, stream)
    return Oddities(*([one.decode() for one in ids] for ids in reply)) if reply else Oddities()


async def delete(
    redis: Redis, stream: Stream, where: Literal["pending", "dead"], most: int
) -> dict[str, Place]:
    """XDEL of the oldest entries in a view; returns what was deleted, and where it was."""
    return _places(await _run(redis, _REMOVE, stream, where, most))


async def trim(redis: Redis, stream: Stream, most: int) -> dict[str, Place]:
    """XTRIM of the oldest entries, wherever they are; returns what was trimmed, and where it was."""
    return _places(await _run(redis, _REMOVE, stream, "all", most))


async def _run(redis: Redis, script: str, stream: Stream, *args: str | int) -> Any:
    answer: Any = redis.eval(script, 1, stream.name, stream.group, stream.dead_group, *map(str, args))
    return await answer


def _places(reply: Any) -> dict[str, Place]:
    return {entry_id.decode(): place.decode() for entry_id, place in reply}
