-- Sessions of the agent were closed.
-- KEYS  open sessions of the agent, those in doubt, closed ones
-- ARGV  now, milliseconds that closed sessions stay, then for each: session, deadline

for i = 3, #ARGV, 2 do
  redis.call('ZREM', KEYS[1], ARGV[i])
  redis.call('ZREM', KEYS[2], ARGV[i])
  redis.call('ZADD', KEYS[3], ARGV[i + 1], ARGV[i])
end
outlive(KEYS[3], tonumber(ARGV[2]))
return 1
