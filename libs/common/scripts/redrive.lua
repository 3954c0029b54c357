-- Moves dead entries back into the live group, to the consumer every live consumer looks into.
-- Only what is pending in the twin moves: an id that is not there any more changes nothing.
--
-- XCLAIM is the only command that can fail (no live group), so it is the first that writes. The ids are whole ones
-- (the caller checks): a bad one in the middle would fail half-way.
--
-- KEYS     1 stream   2 dead         3 ledger
-- ARGV     1 group    2 twin group   3 handover   4.. ids, each once
-- returns  {1 redriven, 0 not in the twin, -1 vanished: no longer in the stream, ...}
local rows, redriven, vanished = {}, 0, 0
for i = 4, #ARGV do
  local id = ARGV[i]
  local row = 0
  if #redis.call('XPENDING', KEYS[1], ARGV[2], id, id, 1) == 1 then
    local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, id, 'RETRYCOUNT', 1, 'FORCE', 'JUSTID')
    redis.call('XACK', KEYS[1], ARGV[2], id)
    redis.call('HDEL', KEYS[2], id)
    if #claimed == 1 then
      row, redriven = 1, redriven + 1
    else
      row, vanished = -1, vanished + 1
    end
  end
  rows[#rows + 1] = row
end
if redriven > 0 then redis.call('HINCRBY', KEYS[3], 'redriven', redriven) end
if vanished > 0 then redis.call('HINCRBY', KEYS[3], 'vanished', vanished) end
return rows
