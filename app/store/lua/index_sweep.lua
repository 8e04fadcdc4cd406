-- Forget sessions that are gone, and set right the deadlines of those that are not.
-- KEYS  all sessions, closed sessions, closings
-- ARGV  now, how many are gone, their entries, then for each of the others: entry, deadline

local gone = tonumber(ARGV[2])
for i = 3, 2 + gone do
  redis.call('ZREM', KEYS[1], ARGV[i])
  redis.call('ZREM', KEYS[2], ARGV[i])
  redis.call('ZREM', KEYS[3], ARGV[i])
end
for i = 3 + gone, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], ARGV[i + 1], ARGV[i])
end
return 1
