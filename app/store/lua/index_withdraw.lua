-- The announced session was refused and will not exist.
-- KEYS  all sessions, remembered creations, the creation with this idempotency key
-- ARGV  now, entry, idempotency digest or ''

redis.call('ZREM', KEYS[1], ARGV[2])
if ARGV[3] ~= '' then
  local known = redis.call('HMGET', KEYS[3], 'entry', 'session')
  if known[1] == ARGV[2] and not known[2] then
    redis.call('DEL', KEYS[3])
    redis.call('ZREM', KEYS[2], ARGV[3])
  end
end
return 1
