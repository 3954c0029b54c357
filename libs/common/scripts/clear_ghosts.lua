-- Clears ghosts from the dead-letter view: pending in the twin, but gone from the stream (XDEL, XTRIM by others).
--
-- KEYS     1 stream   2 dead   3 ledger
-- ARGV     1 twin group   2 from which id on   3 count
-- returns  {where to go on or '' at the end, cleared id, ...}
local rows = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], '+', ARGV[3])
local reply = {''}
for _, row in ipairs(rows) do
  local id = row[1]
  if #redis.call('XRANGE', KEYS[1], id, id) == 0 then
    redis.call('XACK', KEYS[1], ARGV[1], id)
    redis.call('HDEL', KEYS[2], id)
    redis.call('HINCRBY', KEYS[3], 'vanished', 1)
    reply[#reply + 1] = id
  end
end
if #rows == tonumber(ARGV[3]) then reply[1] = '(' .. rows[#rows][1] end
return reply
