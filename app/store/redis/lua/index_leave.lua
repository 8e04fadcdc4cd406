-- This replica sweeps no more; another need not wait for the end of its turn.
-- KEYS  the sweeping replica
-- ARGV  now, this replica

if redis.call('GET', KEYS[1]) == ARGV[2] then
  redis.call('DEL', KEYS[1])
end
return 1
