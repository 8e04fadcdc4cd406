-- Sessions of the agent are gone.
-- KEYS  open sessions of the agent, closed ones
-- ARGV  now, the sessions

for i = 2, #ARGV do
  redis.call('ZREM', KEYS[1], ARGV[i])
  redis.call('ZREM', KEYS[2], ARGV[i])
end
return 1
