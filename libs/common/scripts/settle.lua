-- Settles delivered entries: they leave the group, the stream and, had they died meanwhile, the dead-letter view.
-- A 2xx is a fact, whoever owns the entry by now; what somebody else has settled already is not counted again.
--
-- KEYS     1 stream   2 dead   3 ledger   4 turn (only where the stream promises order)
-- ARGV     1 group    2 twin group   3 token of the turn
--          4 JSON: {"delivered": [id, audio ms, connection ms, bytes, requests, id, …], "duplicate": […]}
--            (one argument for all: an argument each costs the client more than all else it does to settle,
--            and of what one may be, flat lists are read in the least time)
-- returns  how many were settled by this call, -1 when the turn is somebody else's
if KEYS[4] and redis.call('GET', KEYS[4]) ~= ARGV[3] then return -1 end

local stream, group, twin = KEYS[1], ARGV[1], ARGV[2]
local names = {'audio_ms', 'connection_ms', 'data_bytes', 'request_count'}
local settled, counts, sums = {}, {delivered = 0, duplicate = 0}, {0, 0, 0, 0}
for outcome, entries in pairs(cjson.decode(ARGV[4])) do
  for i = 1, #entries, 5 do
    local id = entries[i]
    local removed = redis.call('XACK', stream, group, id)
    if removed == 0 then
      removed = redis.call('XACK', stream, twin, id)
      if removed == 1 then redis.call('HDEL', KEYS[2], id) end
    end
    if removed == 1 then
      settled[#settled + 1] = id
      counts[outcome] = counts[outcome] + 1
      for f = 1, 4 do sums[f] = sums[f] + entries[i + f] end
    end
  end
end
if #settled > 0 then redis.call('XDEL', stream, unpack(settled)) end
for outcome, n in pairs(counts) do
  if n > 0 then redis.call('HINCRBY', KEYS[3], outcome, n) end
end
for f = 1, 4 do
  if sums[f] > 0 then redis.call('HINCRBY', KEYS[3], names[f], string.format('%.0f', sums[f])) end
end
return #settled
