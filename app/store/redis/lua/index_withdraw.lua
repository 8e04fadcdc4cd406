-- The announced session was refused and will not exist, unless somebody who came with the same
-- idempotency key was luckier.
-- KEYS  all sessions, entries in doubt, remembered creations, the creation with this
--       idempotency key
-- ARGV  now, entry, idempotency digest or ''

if ARGV[3] ~= '' then
  local known = redis.call('HMGET', KEYS[4], 'entry', 'session')
  if known[1] ~= ARGV[2] or known[2] then
    return 0
  end
  redis.call('DEL', KEYS[4])
  redis.call('ZREM', KEYS[3], ARGV[3])
end
redis.call('ZREM', KEYS[1], ARGV[2])
redis.call('ZREM', KEYS[2], ARGV[2])
return 1
