-- Replaces what is remembered under a key, if nobody has replaced it meanwhile.
-- A repeated call finds what it wrote itself, and says so.
--
-- KEYS     1 key
-- ARGV     1 what was read before, '' for nothing   2 what is remembered from now on   3 for how long (s)
-- returns  1 remembered, 0 somebody else was quicker
local now = redis.call('GET', KEYS[1]) or ''
if now ~= ARGV[1] and now ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return 1
