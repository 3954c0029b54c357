-- Deletes dead entries for good, and hands back what they said, for the audit log.
-- Only what is pending in the twin goes: an id that is not there any more changes nothing.
--
-- KEYS     1 stream       2 dead                      3 ledger
-- ARGV     1 twin group   2 bytes to return at most   3.. ids, each once
-- returns  {{1, reason, data or nil} discarded, {0} not in the twin, {-1, reason} vanished: no longer in the stream, ...}
--          once that many bytes are gathered the remaining ids are left alone and have no row: come again with them
local rows, discarded, vanished, bytes = {}, 0, 0, 0
local most = tonumber(ARGV[2])
for i = 3, #ARGV do
  local id = ARGV[i]
  local row = {0}
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if #pending == 1 then
    local reason = pending[1][2]
    local found = redis.call('XRANGE', KEYS[1], id, id)
    redis.call('XACK', KEYS[1], ARGV[1], id)
    redis.call('HDEL', KEYS[2], id)
    if #found == 1 then
      local data, fields = false, found[1][2]
      for f = 1, #fields, 2 do
        if fields[f] == 'data' then data = fields[f + 1] end
      end
      if data then bytes = bytes + #data end
      redis.call('XDEL', KEYS[1], id)
      row, discarded = {1, reason, data}, discarded + 1
    else
      row, vanished = {-1, reason}, vanished + 1
    end
  end
  rows[#rows + 1] = row
  if bytes >= most then break end
end
if discarded > 0 then redis.call('HINCRBY', KEYS[3], 'discarded', discarded) end
if vanished > 0 then redis.call('HINCRBY', KEYS[3], 'vanished', vanished) end
return rows
