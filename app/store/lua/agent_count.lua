-- How many sessions of the agent are active.
-- KEYS  open sessions of the agent
-- ARGV  now

return redis.call('ZCOUNT', KEYS[1], string.format('(%.0f', clock()), '+inf')
