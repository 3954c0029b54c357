-- Renews the lease on entries and writes their delivery count; only on those that are still this consumer's.
--
-- KEYS     1 stream   2 ledger
-- ARGV     1 group    2 consumer   3.. per entry: id, delivery count
-- returns  {{id that is somebody else's by now, ...}, {vanished id, ...}}
local lost, vanished = {}, {}
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if #pending == 0 or pending[1][2] ~= ARGV[2] then
    lost[#lost + 1] = id
  elseif #redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'RETRYCOUNT', ARGV[i + 1], 'JUSTID') == 0 then
    vanished[#vanished + 1] = id
  end
end
if #vanished > 0 then redis.call('HINCRBY', KEYS[2], 'vanished', #vanished) end
return {lost, vanished}
