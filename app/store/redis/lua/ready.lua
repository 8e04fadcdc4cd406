-- See whether the engine takes writes.
-- KEYS  a key for this
-- ARGV  now

redis.call('SET', KEYS[1], 1, 'PX', 60000)
return 1
