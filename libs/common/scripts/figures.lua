-- Reads a stream's figures as of one instant. Redis's own lag is not among them: it turns nil in normal use.
--
-- KEYS     1 stream   2 ledger
-- ARGV     1 group    2 twin group
-- returns  {length, entries added, pending, oldest unsettled id or '', {reason, n, ...}, {name, pending, idle ms, ...},
--           {ledger field, value, ...}}; everything 0 or empty where the stream or a group is missing
local ledger = redis.call('HGETALL', KEYS[2])
if redis.call('EXISTS', KEYS[1]) == 0 then return {0, 0, 0, '', {}, {}, ledger} end

local added, delivered_up_to = 0, nil
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'entries-added' then added = info[i + 1] end
end
local groups = {}
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local named = {}
  for i = 1, #group, 2 do named[group[i]] = group[i + 1] end
  groups[named.name] = named['last-delivered-id']
end

local oldest, pending, consumers, dead = '', 0, {}, {}
if groups[ARGV[1]] then
  local summary = redis.call('XPENDING', KEYS[1], ARGV[1])
  pending = summary[1]
  if pending > 0 then oldest = summary[2] end
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
    local named = {}
    for i = 1, #consumer, 2 do named[consumer[i]] = consumer[i + 1] end
    consumers[#consumers + 1] = named.name
    consumers[#consumers + 1] = named.pending
    consumers[#consumers + 1] = named.idle
  end
end
if oldest == '' then
  local next_row = redis.call('XRANGE', KEYS[1], '(' .. (groups[ARGV[1]] or '0-0'), '+', 'COUNT', 1)
  if #next_row == 1 then oldest = next_row[1][1] end
end
if groups[ARGV[2]] then
  local summary = redis.call('XPENDING', KEYS[1], ARGV[2])
  for _, reason in ipairs(summary[4] or {}) do
    dead[#dead + 1] = reason[1]
    dead[#dead + 1] = tonumber(reason[2])
  end
end
return {redis.call('XLEN', KEYS[1]), added, pending, oldest, dead, consumers, ledger}
