-- Removes one consumer's name on its owner's stop, unless something is still pending under it.
--
-- KEYS     1 stream
-- ARGV     1 group    2 consumer
-- returns  1 removed, 0 something is pending: whoever takes it over removes the name later
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
