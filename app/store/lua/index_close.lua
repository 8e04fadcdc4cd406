-- Sessions were closed.
-- KEYS  all sessions, closed sessions, closings
-- ARGV  now, then for each: entry, deadline, instant of the closing

for i = 2, #ARGV, 3 do
  -- The session is there, whether its announcement was confirmed or not.
  redis.call('ZADD', KEYS[1], ARGV[i + 1], ARGV[i])
  redis.call('ZADD', KEYS[2], ARGV[i + 1], ARGV[i])
  redis.call('ZADD', KEYS[3], ARGV[i + 2], ARGV[i])
end
local life = redis.call('PTTL', KEYS[1])
outlive(KEYS[2], life)
outlive(KEYS[3], life)
return 1
