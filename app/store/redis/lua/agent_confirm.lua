-- Sessions of the agent that were in doubt are open until their deadline.
-- KEYS  open sessions of the agent, those in doubt
-- ARGV  now, then for each: session, deadline

for i = 2, #ARGV, 2 do
  -- Not if somebody has closed it meanwhile and taken it out.
  redis.call('ZADD', KEYS[1], 'XX', ARGV[i + 1], ARGV[i])
  redis.call('ZREM', KEYS[2], ARGV[i])
end
return 1
