-- Hands entries over to whoever looks next into the consumer `handover`; their delivery count counts no crash.
--
-- KEYS     1 stream
-- ARGV     1 group    2 consumer   3 handover   4.. per entry: id, delivery count
-- returns  how many were handed over; what is somebody else's by now is left alone
local n = 0
for i = 4, #ARGV, 2 do
  local id = ARGV[i]
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if #pending == 1 and pending[1][2] == ARGV[2] then
    n = n + #redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, id, 'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
  end
end
return n
