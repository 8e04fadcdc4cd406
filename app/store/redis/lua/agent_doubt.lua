-- Sessions of the agent are about to be closed. They count until their lease ends, so that none
-- keeps the cap used up if nobody says how that ended; and they stay in reach.
-- KEYS  open sessions of the agent, those in doubt
-- ARGV  now, lease in microseconds, the sessions

local until_then = clock() + tonumber(ARGV[2])
for i = 3, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    redis.call('ZADD', KEYS[2], until_then, ARGV[i])
  end
end
outlive(KEYS[2], redis.call('PTTL', KEYS[1]))
return 1
