-- Announced or doubtful sessions of the agent are open until their deadline.
-- KEYS  open sessions of the agent
-- ARGV  now, milliseconds until they may be removed, then for each: session, deadline

for i = 3, #ARGV, 2 do
  -- Not if somebody has closed it meanwhile and taken it out.
  redis.call('ZADD', KEYS[1], 'XX', ARGV[i + 1], ARGV[i])
end
outlive(KEYS[1], tonumber(ARGV[2]))
return 1
