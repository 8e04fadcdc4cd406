-- Sessions were looked at in order to close them.
-- KEYS  all sessions, entries in doubt, closed sessions, closings
-- ARGV  now, then for each: entry, deadline, instant of the closing or '' if it is not closed

for i = 2, #ARGV, 3 do
  local entry, deadline, closed = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  redis.call('ZREM', KEYS[2], entry)
  redis.call('ZADD', KEYS[1], deadline, entry)
  if closed ~= '' then
    redis.call('ZADD', KEYS[3], deadline, entry)
    redis.call('ZADD', KEYS[4], closed, entry)
  end
end
local life = redis.call('PTTL', KEYS[1])
outlive(KEYS[3], life)
outlive(KEYS[4], life)
return 1
