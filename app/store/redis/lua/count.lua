-- How many open sessions of an index have their deadline ahead.
-- KEYS  clock, an index of open sessions
-- ARGV  prefix, now
-- Returns the number.

report_expired_of(KEYS[2])
return redis.call('ZCOUNT', KEYS[2], '(' .. whole(now), '+inf')
