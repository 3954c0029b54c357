-- Makes the live group and its twin, and notes in the ledger from where its books begin.
-- Done again whenever the stream or a group has gone; what is there already is left as it is.
--
-- KEYS     1 stream   2 ledger   3 dead
-- ARGV     1 group    2 twin group   3 greatest id
-- returns  {1 when the live group was made, 1 when the twin was made, 1 when the books were begun anew}

-- Out of memory nothing may be created, but a consumer that starts then finds its groups and drains.
local function is_there(group)
  if redis.call('EXISTS', KEYS[1]) == 0 then return false end
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    for i = 1, #info, 2 do
      if info[i] == 'name' and info[i + 1] == group then return true end
    end
  end
  return false
end

local function make(group, from)
  if is_there(group) then return 0 end
  local reply = redis.pcall('XGROUP', 'CREATE', KEYS[1], group, from, 'MKSTREAM')
  return reply.err and reply or 1
end

local live = make(ARGV[1], '0')
if type(live) == 'table' then return live end
local twin = make(ARGV[2], ARGV[3])
if type(twin) == 'table' then return twin end

-- A twin that was destroyed left its dead letters in no view: their documents tell what they died of.
if twin == 1 then
  local documents = redis.call('HGETALL', KEYS[3])
  for i = 1, #documents, 2 do
    local id = documents[i]
    local read, document = pcall(cjson.decode, documents[i + 1])
    if not read or type(document) ~= 'table' then document = {} end
    local reason, attempts = document.reason or 'rejected', math.max(1, document.attempts or 1)
    local shown = redis.call('XCLAIM', KEYS[1], ARGV[2], reason, 0, id, 'RETRYCOUNT', attempts, 'FORCE', 'JUSTID')
    if #shown == 0 then
      redis.call('HDEL', KEYS[3], id)
      redis.call('HINCRBY', KEYS[2], 'vanished', 1)
    end
  end
end
if live == 0 then return {live, twin, 0} end

local added, length = 0, redis.call('XLEN', KEYS[1])
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'entries-added' then added = info[i + 1] end
end
local ended = 0
for _, field in ipairs({'delivered', 'duplicate', 'discarded', 'vanished'}) do
  ended = ended + tonumber(redis.call('HGET', KEYS[2], field) or 0)
end
local base = tonumber(redis.call('HGET', KEYS[2], 'base') or '')
-- A counter below what has ended and what is there means another stream under the same name (DEL, roll-back).
if not base or added - base < ended + length then
  redis.call('HSET', KEYS[2], 'base', string.format('%.0f', added - length - ended))
  return {live, twin, 1}
end
return {live, twin, 0}
