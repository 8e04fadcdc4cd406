-- The announced session exists.
-- KEYS  all sessions, remembered creations, the creation with this idempotency key
-- ARGV  now, entry, deadline, milliseconds until it may be removed, idempotency digest or '',
--       grant as text, session as text, microseconds to remember a creation

redis.call('ZADD', KEYS[1], ARGV[3], ARGV[2])
outlive(KEYS[1], tonumber(ARGV[4]))
if ARGV[5] ~= '' then
  local known = redis.call('HGET', KEYS[3], 'forget_at')
  local forget_at = known or clock() + tonumber(ARGV[8])
  redis.call('HSET', KEYS[3], 'forget_at', forget_at, 'grant', ARGV[6], 'entry', ARGV[2],
    'session', ARGV[7])
  outlive(KEYS[3], ARGV[8] / 1000)
  redis.call('ZADD', KEYS[2], forget_at, ARGV[5])
  outlive(KEYS[2], ARGV[8] / 1000)
end
return 1
