-- Sessions of the agent were closed.
-- KEYS  open sessions of the agent, closed ones
-- ARGV  now, then for each: session, deadline

local life = redis.call('PTTL', KEYS[1])
for i = 2, #ARGV, 2 do
  redis.call('ZREM', KEYS[1], ARGV[i])
  redis.call('ZADD', KEYS[2], ARGV[i + 1], ARGV[i])
end
outlive(KEYS[2], math.max(life, 3600 * 1000))
return 1
