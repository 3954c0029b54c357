-- Makes the live group and its twin, and notes in the ledger from where its books begin.
-- Done again whenever the stream or a group has gone; what is there already is left as it is.
--
-- KEYS     1 stream   2 ledger
-- ARGV     1 group    2 twin group   3 greatest id
-- returns  {1 when the live group was made, 1 when the twin was made, 1 when the books were begun anew}
local function make(group, from)
  local reply = redis.pcall('XGROUP', 'CREATE', KEYS[1], group, from, 'MKSTREAM')
  if not reply.err then return 1 end
  if string.find(reply.err, 'BUSYGROUP', 1, true) then return 0 end
  return reply
end

local live = make(ARGV[1], '0')
if type(live) == 'table' then return live end
local twin = make(ARGV[2], ARGV[3])
if type(twin) == 'table' then return twin end
if live == 0 then return {live, twin, 0} end

local added, length = 0, redis.call('XLEN', KEYS[1])
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'entries-added' then added = info[i + 1] end
end
local ended = 0
for _, field in ipairs({'delivered', 'duplicate', 'discarded', 'vanished'}) do
  ended = ended + tonumber(redis.call('HGET', KEYS[2], field) or 0)
end
local base = tonumber(redis.call('HGET', KEYS[2], 'base') or '')
-- A counter below what the ledger has seen end means another stream under the same name (DEL, roll-back).
if not base or added - base < ended then
  redis.call('HSET', KEYS[2], 'base', string.format('%.0f', added - length - ended))
  return {live, twin, 1}
end
return {live, twin, 0}
