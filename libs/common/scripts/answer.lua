-- Answers quota requests: the grant and the settlement are one step, so there is never a second grant.
-- Only the request's present owner may answer; for anybody else nothing changes.
--
-- KEYS     1 stream   2 ledger   3 response stream
-- ARGV     1 group    2 consumer   3 how long grants are kept (ms)
--          4.. per request: id, outcome ('delivered' or 'duplicate'), the grant (JSON), correlation id
-- returns  {1 answered or 0 not mine any more, ...}
local now = redis.call('TIME')
local oldest = string.format('%.0f', now[1] * 1000 - tonumber(ARGV[3]))
local reply = {}
for i = 4, #ARGV, 4 do
  local id = ARGV[i]
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if #pending == 1 and pending[1][2] == ARGV[2] then
    redis.call('XADD', KEYS[3], 'MINID', '~', oldest, '*', 'data', ARGV[i + 2], 'correlation_id', ARGV[i + 3])
    redis.call('XACK', KEYS[1], ARGV[1], id)
    redis.call('XDEL', KEYS[1], id)
    redis.call('HINCRBY', KEYS[2], ARGV[i + 1], 1)
    reply[#reply + 1] = 1
  else
    reply[#reply + 1] = 0
  end
end
return reply
