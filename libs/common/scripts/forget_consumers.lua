-- Removes the names of consumers that have nothing pending and have not been heard of for long.
-- Both are checked in the same step: removing a name with something pending would lose it.
--
-- KEYS     1 stream
-- ARGV     1 group    2 idle for at least (ms)   3.. names that stay
-- returns  {removed name, ...}
local stays = {}
for i = 3, #ARGV do stays[ARGV[i]] = true end
local removed = {}
for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #info, 2 do consumer[info[i]] = info[i + 1] end
  if consumer.pending == 0 and consumer.idle >= tonumber(ARGV[2]) and not stays[consumer.name] then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
    removed[#removed + 1] = consumer.name
  end
end
return removed
