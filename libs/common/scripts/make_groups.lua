-- Makes the live group and its twin; what is there already is left as it is.
-- Done again whenever the stream or a group has gone. Where the books begin is for keep_books, which comes next.
--
-- KEYS     1 stream   2 ledger   3 dead
-- ARGV     1 group    2 twin group   3 greatest id
-- returns  {1 when the live group was made, 1 when the twin was made}

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
return {live, twin}
