-- The announced session exists.
-- KEYS  all sessions, entries in doubt, remembered creations, the creation with this
--       idempotency key
-- ARGV  now, entry, deadline, idempotency digest or '', grant as text, session as text,
--       microseconds to remember a creation

redis.call('ZADD', KEYS[1], ARGV[3], ARGV[2])
redis.call('ZREM', KEYS[2], ARGV[2])
if ARGV[4] ~= '' then
  local known = redis.call('HGET', KEYS[4], 'forget_at')
  local forget_at = known or clock() + tonumber(ARGV[7])
  redis.call('HSET', KEYS[4], 'forget_at', forget_at, 'grant', ARGV[5], 'entry', ARGV[2],
    'session', ARGV[6])
  outlive(KEYS[4], ARGV[7] / 1000)
  redis.call('ZADD', KEYS[3], forget_at, ARGV[4])
  outlive(KEYS[3], ARGV[7] / 1000)
end
return 1
