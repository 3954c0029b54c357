-- Hands entries over to whoever looks next into the consumer `handover`; their delivery count counts no crash.
--
-- KEYS     1 stream   2 ledger
-- ARGV     1 group    2 consumer   3 handover   4.. per entry: id, delivery count
-- returns  {how many were handed over, {vanished id, ...}}; what is somebody else's by now is left alone
local n, vanished = 0, {}
for i = 4, #ARGV, 2 do
  local id = ARGV[i]
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if #pending == 1 and pending[1][2] == ARGV[2] then
    local moved = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, id, 'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
    if #moved == 1 then n = n + 1 else vanished[#vanished + 1] = id end
  end
end
if #vanished > 0 then redis.call('HINCRBY', KEYS[2], 'vanished', #vanished) end
return {n, vanished}
