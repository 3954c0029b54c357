-- Settles delivered entries: they leave the group, the stream and, had they died meanwhile, the dead-letter view.
-- A 2xx is a fact, whoever owns the entry by now; what somebody else has settled already is not counted again.
--
-- KEYS     1 stream   2 dead   3 ledger   4 turn (only where the stream promises order)
-- ARGV     1 group    2 twin group   3 token of the turn
--          4 a line per entry: id, outcome ('delivered' or 'duplicate'), audio ms, connection ms, bytes, requests
--            (one argument for all: six each cost the client more than all else it does to settle)
-- returns  how many were settled by this call, -1 when the turn is somebody else's
if KEYS[4] and redis.call('GET', KEYS[4]) ~= ARGV[3] then return -1 end

local stream, group, twin = KEYS[1], ARGV[1], ARGV[2]
local names = {'audio_ms', 'connection_ms', 'data_bytes', 'request_count'}
local settled, counts, sums = {}, {delivered = 0, duplicate = 0}, {0, 0, 0, 0}
for id, outcome, audio, connection, bytes, requests in
  string.gmatch(ARGV[4], '(%S+) (%a+) (%d+) (%d+) (%d+) (%d+)') do
  local removed = redis.call('XACK', stream, group, id)
  if removed == 0 then
    removed = redis.call('XACK', stream, twin, id)
    if removed == 1 then redis.call('HDEL', KEYS[2], id) end
  end
  if removed == 1 then
    settled[#settled + 1] = id
    counts[outcome] = counts[outcome] + 1
    sums[1], sums[2], sums[3], sums[4] = sums[1] + audio, sums[2] + connection, sums[3] + bytes, sums[4] + requests
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
