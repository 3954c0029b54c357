-- Gives the turn up, if it is ours.
--
-- KEYS     1 turn
-- ARGV     1 token
-- returns  1 given up, 0 it was not ours
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
