-- Sessions are about to be closed: somebody comes to look if nobody says how that ended.
-- KEYS  all sessions, entries in doubt
-- ARGV  now, lease in microseconds, the entries

local until_then = clock() + tonumber(ARGV[2])
for i = 3, #ARGV do
  redis.call('ZADD', KEYS[2], until_then, ARGV[i])
end
outlive(KEYS[2], redis.call('PTTL', KEYS[1]))
return 1
