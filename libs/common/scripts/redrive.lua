-- Moves dead entries back into the live group, to the consumer every live consumer looks into.
-- Only what is pending in the twin moves: an id that is not there any more changes nothing.
--
-- What the live group has not come to yet (it was made again, and reads from the beginning) is left for it to read:
-- claimed before, it would be delivered a second time, out of the hands of whoever works on it.
--
-- XCLAIM is the only command that can fail (no live group), so it is the first that writes. The ids are whole ones
-- (the caller checks): a bad one in the middle would fail half-way.
--
-- KEYS     1 stream   2 dead         3 ledger
-- ARGV     1 group    2 twin group   3 handover   4.. ids, each once
-- returns  {1 redriven, 0 not in the twin, -1 vanished: no longer in the stream, ...}
local function read_up_to()
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = {}
    for i = 1, #info, 2 do group[info[i]] = info[i + 1] end
    if group.name == ARGV[1] then return group['last-delivered-id'] end
  end
end

local rows, redriven, vanished = {}, 0, 0
local last
for i = 4, #ARGV do
  local id = ARGV[i]
  local row = 0
  if #redis.call('XPENDING', KEYS[1], ARGV[2], id, id, 1) == 1 then
    last = last or read_up_to()
    local found
    if last and #redis.call('XRANGE', KEYS[1], '(' .. last, id, 'COUNT', 1) > 0 then
      found = redis.call('XRANGE', KEYS[1], id, id)
    else
      found = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, id, 'RETRYCOUNT', 1, 'FORCE', 'JUSTID')
    end
    redis.call('XACK', KEYS[1], ARGV[2], id)
    redis.call('HDEL', KEYS[2], id)
    if #found == 1 then
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
