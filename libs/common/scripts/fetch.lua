-- Brings the fields of entries that are this consumer's own, and renews their lease.
--
-- KEYS     1 stream   2 ledger
-- ARGV     1 group    2 consumer   3 longest entry   4.. ids
-- returns  {{vanished id, ...}, {id, data, correlation id, traceparent, delivery count}, ...}; an id that is
--          somebody else's by now is left out
local stream, group, me, longest = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local vanished = {}
local reply = {vanished}
for i = 4, #ARGV do
  local id = ARGV[i]
  local pending = redis.call('XPENDING', stream, group, id, id, 1)
  if #pending == 1 and pending[1][2] == me then
    if #redis.call('XCLAIM', stream, group, me, 0, id, 'RETRYCOUNT', pending[1][4], 'JUSTID') == 0 then
      vanished[#vanished + 1] = id
    else
      local out, size = {id, false, false, false, pending[1][4]}, 0
      local fields = redis.call('XRANGE', stream, id, id)[1][2]
      for f = 1, #fields, 2 do
        local name, value = fields[f], fields[f + 1]
        size = size + #name + #value
        if name == 'data' then out[2] = value
        elseif name == 'correlation_id' then out[3] = value
        elseif name == 'traceparent' then out[4] = value end
      end
      if size > longest then out = {id, size, false, false, pending[1][4]} end
      reply[#reply + 1] = out
    end
  end
end
if #vanished > 0 then redis.call('HINCRBY', KEYS[2], 'vanished', #vanished) end
return reply
