-- Moves entries into the dead-letter view: pending in the twin group, under the reason as consumer name.
-- Only the entry's present owner may do it. The payload stays in the stream.
-- What can fail comes first: without the twin group nothing has changed yet.
--
-- KEYS     1 stream   2 dead   3 ledger   4 turn (only where the stream promises order)
-- ARGV     1 group    2 twin group   3 consumer   4 token of the turn
--          5.. per entry: id, reason, attempts, document (JSON)
-- returns  {1 buried, 0 not mine any more, -1 the entry no longer exists, ...}; -2 when the turn is somebody else's
if KEYS[4] and redis.call('GET', KEYS[4]) ~= ARGV[4] then return -2 end

local stream, group, twin, me = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local reply = {}
for i = 5, #ARGV, 4 do
  local id, reason = ARGV[i], ARGV[i + 1]
  local pending = redis.call('XPENDING', stream, group, id, id, 1)
  local result = 0
  if #pending == 1 and pending[1][2] == me then
    local moved = redis.call('XCLAIM', stream, twin, reason, 0, id, 'RETRYCOUNT', ARGV[i + 2], 'FORCE', 'JUSTID')
    if #moved == 1 then
      redis.call('HSET', KEYS[2], id, ARGV[i + 3])
      redis.call('HINCRBY', KEYS[3], 'dead:' .. reason, 1)
      result = 1
    else
      redis.call('HINCRBY', KEYS[3], 'vanished', 1)
      result = -1
    end
    redis.call('XACK', stream, group, id)
  end
  reply[#reply + 1] = result
end
return reply
