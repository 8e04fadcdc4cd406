-- Claim the layout of the keys, and find out which one is in force. It writes, so that it fails
-- where nothing can be written.
-- KEYS  layout
-- ARGV  version
-- Returns the version in force.

redis.call('SET', KEYS[1], ARGV[1], 'NX')
return redis.call('GET', KEYS[1])
