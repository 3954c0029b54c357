-- Takes over what nobody works on: first what lies with the consumer `handover` (stopped processes, redriven
-- entries: their delivery count stays), then what a dead consumer left (its count tells of one crash more,
-- up to 3: a suspect). From 3 on only the deliverer counts, before it delivers the entry alone.
--
-- KEYS     1 stream   2 ledger   3 turn (only where the stream promises order)
-- ARGV     1 group    2 consumer   3 handover   4 idle for at least (ms; -1: only handover)
--          5 cursor   6 count    7 longest entry   8 token of the turn
-- returns  {next cursor ('' when only handover was looked into), {vanished id, ...}, {id, data, correlation id, traceparent, delivery count}, ...}
--          a suspect comes without its fields: it is fetched when it is delivered alone
--          {-1} when the turn is somebody else's
if KEYS[3] and redis.call('GET', KEYS[3]) ~= ARGV[8] then return {-1} end

local stream, group, me, handover = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local idle, cursor, count, longest = tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local SUSPECT = 3
local vanished = {}
local reply = {'', vanished}

local function row(id, deliveries)
  if deliveries >= SUSPECT then return {id, false, false, false, deliveries} end
  local fields, out, size = redis.call('XRANGE', stream, id, id)[1][2], {id, false, false, false, deliveries}, 0
  for f = 1, #fields, 2 do
    local name, value = fields[f], fields[f + 1]
    size = size + #name + #value
    if name == 'data' then out[2] = value
    elseif name == 'correlation_id' then out[3] = value
    elseif name == 'traceparent' then out[4] = value end
  end
  if size > longest then out = {id, size, false, false, deliveries} end
  return out
end

local function take(id, deliveries)
  local claimed = redis.call('XCLAIM', stream, group, me, 0, id, 'RETRYCOUNT', deliveries, 'JUSTID')
  if #claimed == 1 then reply[#reply + 1] = row(id, deliveries) else vanished[#vanished + 1] = id end
end

for _, pending in ipairs(redis.call('XPENDING', stream, group, '-', '+', count, handover)) do
  take(pending[1], math.max(1, pending[4]))
end

if #reply == 2 and #vanished == 0 and idle >= 0 then
  -- Whoever takes all that is pending also meets its own entries and those just handed over: they count no crash.
  local calm = {}
  if idle == 0 then
    for _, pending in ipairs(redis.call('XPENDING', stream, group, cursor == '0-0' and '-' or cursor, '+', count)) do
      calm[pending[1]] = pending[2] == me or pending[2] == handover
    end
  end
  local got = redis.call('XAUTOCLAIM', stream, group, me, idle, cursor, 'COUNT', count, 'JUSTID')
  reply[1] = got[1]
  for _, id in ipairs(got[3]) do vanished[#vanished + 1] = id end
  for _, id in ipairs(got[2]) do
    local deliveries = redis.call('XPENDING', stream, group, id, id, 1)[1][4]
    take(id, deliveries < SUSPECT and not calm[id] and deliveries + 1 or deliveries)
  end
end

if #vanished > 0 then redis.call('HINCRBY', KEYS[2], 'vanished', #vanished) end
return reply
