-- How many sessions are active.
-- KEYS  all sessions, closed sessions
-- ARGV  now

local after = string.format('(%.0f', clock())
return redis.call('ZCOUNT', KEYS[1], after, '+inf') - redis.call('ZCOUNT', KEYS[2], after, '+inf')
