-- Takes the turn when nobody has it, or renews it when it is ours, if need be under a new token.
-- DEL comes before SET: after a first write, a memory limit refuses no more, so a holder is found out of memory too.
--
-- KEYS     1 turn
-- ARGV     1 token   2 time to live (ms)   3 another token of ours, which it replaces, or ''
-- returns  2 taken, 1 renewed, 0 somebody else's
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
if holder and holder ~= ARGV[3] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return holder and 1 or 2
