-- Reads new entries through the group without ever blocking, and nothing larger than the reader can hold.
-- It reads in steps from one, that at most double and always fit, so that a run of huge entries is noticed at once.
-- Ids that are dead letters (the live group was re-made from 0) are acknowledged unread.
--
-- KEYS     1 stream   2 turn (only where the stream promises order)
-- ARGV     1 group    2 twin group   3 consumer   4 count   5 bytes   6 longest entry   7 token of the turn
-- returns  {id behind which something new would be, or '', {id, data, correlation id, traceparent}, ...}
--          data is nil where the field is missing, and a length where the entry is too long to be carried
--          {-1} when the turn is somebody else's
if KEYS[2] and redis.call('GET', KEYS[2]) ~= ARGV[7] then return {-1} end

local stream, group, twin, me = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local left, room, longest = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local dead = redis.call('XPENDING', stream, twin)
local last_dead = dead[1] > 0 and tonumber(string.match(dead[3], '^%d+'))

local function is_dead(id)
  if not last_dead or tonumber(string.match(id, '^%d+')) > last_dead then return false end
  return #redis.call('XPENDING', stream, twin, id, id, 1) > 0
end

local reply, step = {''}, 1
while left > 0 and room > 0 do
  local asked = math.min(step, left)
  local got = redis.call('XREADGROUP', 'GROUP', group, me, 'COUNT', asked, 'STREAMS', stream, '>')
  if not got then break end
  local rows = got[1][2]
  local used = 0
  for i = 1, #rows do
    local id, fields = rows[i][1], rows[i][2]
    if is_dead(id) then
      redis.call('XACK', stream, group, id)
      reply[1] = id
    else
      local row, size = {id, false, false, false}, 0
      for f = 1, #fields, 2 do
        local name, value = fields[f], fields[f + 1]
        size = size + #name + #value
        if name == 'data' then row[2] = value
        elseif name == 'correlation_id' then row[3] = value
        elseif name == 'traceparent' then row[4] = value end
      end
      if size > longest then row = {id, size, false, false} end
      used = used + size
      reply[#reply + 1] = row
    end
  end
  left, room = left - #rows, room - used
  if #rows < asked then break end
  step = math.max(1, math.min(step * 2, math.floor(room / longest)))
end

if #reply == 1 and reply[1] == '' then
  local info = redis.call('XINFO', 'STREAM', stream)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then reply[1] = info[i + 1] end
  end
end
return reply
