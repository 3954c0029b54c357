-- Looks at a stream beside its books: begins them, or anew where another stream has the name; counts what was lost.
-- Whoever looks first at a loss counts it; who comes later, with whatever it has seen, changes nothing.
--
-- KEYS     1 stream   2 ledger   3 seen: what was there at the last look, whoever looked
--            run, life     the server's run id, and a name for the time since it started or was emptied
--            added         entries-added at the last look
--            floor         the same at the beginning of this life: so much has survived at least
--            counted       1 once this life's beginning has been counted as a loss
--            imbalance     as it was told last
-- ARGV     1 group   2 twin group   3 a name nobody has used yet
--          4..7 what the caller saw at its own last look: life, entries added, length, last id ('' when it never did)
-- returns  {} while the stream or a group is missing: who makes them again looks again
--          {{life, entries added, length, last id}, books begun anew, went back, seen before, lost, imbalance, told before}
if redis.call('EXISTS', KEYS[1]) == 0 then return {} end
local there = {}
for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  for i = 1, #info, 2 do
    if info[i] == 'name' then there[info[i + 1]] = true end
  end
end
if not (there[ARGV[1]] and there[ARGV[2]]) then return {} end

local added, last, length = 0, '', redis.call('XLEN', KEYS[1])
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'entries-added' then added = info[i + 1] end
  if info[i] == 'last-generated-id' then last = info[i + 1] end
end
local ledger = redis.call('HMGET', KEYS[2], 'base', 'delivered', 'duplicate', 'discarded', 'vanished')
local base, ended = tonumber(ledger[1] or ''), 0
for i = 2, 5 do ended = ended + tonumber(ledger[i] or 0) end

local seen, notes = {}, {}
local noted = redis.call('HGETALL', KEYS[3])
for i = 1, #noted, 2 do seen[noted[i]] = noted[i + 1] end
local function note(field, value)
  if type(value) == 'number' then value = string.format('%.0f', value) end
  if seen[field] ~= value then
    seen[field] = value
    notes[#notes + 1], notes[#notes + 2] = field, value
  end
end

-- The server's memory has a beginning: it was started, another took its place, or it was emptied.
local about = redis.pcall('INFO', 'server')  -- not everybody may ask: then the notes alone tell
local run = type(about) == 'string' and string.match(about, 'run_id:(%x+)') or '-'
if seen.run ~= run then
  -- Books without notes have lost nothing: they are from before there were notes.
  note('floor', tonumber(seen.added or '') or base and added or 0)
  note('run', run)
  note('life', ARGV[3])
  note('counted', '0')
end

local before, lost, went = tonumber(seen.added or '') or added, 0, 0
local mine, floor = tonumber(ARGV[5]) or 0, tonumber(seen.floor)
if ARGV[4] ~= '' and ARGV[4] ~= seen.life and seen.counted == '0' and mine > floor then
  -- All that this process saw after the floor is gone, unless the last of it is there.
  if #redis.call('XRANGE', KEYS[1], ARGV[7], ARGV[7]) == 0 then
    went, before, lost = 1, mine, math.min(tonumber(ARGV[6]), mine - floor)
    note('counted', '1')
  end
end

local anew = 0
local imbalance = base and added - base - ended - length or 0
if not base or added < before and went == 0 or imbalance < 0 then
  -- A counter below what was seen, or below what has ended and what is there: another stream, the old one was deleted.
  -- What it held and the books do not know the end of went with it.
  if base and went == 0 then
    went, lost = 1, math.max(0, before - base - ended + added - length)
  end
  anew, imbalance, base = 1, 0, added - length - ended
  redis.call('HSET', KEYS[2], 'base', string.format('%.0f', base))
end
if lost > 0 then redis.call('HINCRBY', KEYS[2], 'lost', lost) end

local told = tonumber(seen.imbalance or 0)
note('imbalance', imbalance)
note('added', added)
if #notes > 0 then redis.call('HSET', KEYS[3], unpack(notes)) end
return {{seen.life, added, length, last}, anew, went, before, lost, imbalance, told}
