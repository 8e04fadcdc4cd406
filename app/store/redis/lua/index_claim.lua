-- Announce a session that is about to be created, before anything else knows of it. Until it
-- is confirmed the entry is in doubt: if nobody goes on before the lease ends, it counts no more,
-- and somebody comes to look.
-- KEYS  all sessions, entries in doubt, remembered creations, the creation with this
--       idempotency key
-- ARGV  now, entry, time limit in microseconds, lease in microseconds, most sessions,
--       idempotency digest or '', the grant as text, microseconds to remember a creation,
--       milliseconds that the index is to live
-- Returns {'new' or 'unfinished', now, entry}, {'replayed', session as text}, {'conflict'},
-- {'full'} or {'creations_full'}.

local now, entry, outcome = clock(), ARGV[2], 'new'
local most, digest, grant = tonumber(ARGV[5]), ARGV[6], ARGV[7]
if digest ~= '' then
  local known = redis.call('HMGET', KEYS[4], 'forget_at', 'grant', 'session', 'entry')
  if known[1] and now < tonumber(known[1]) then
    if known[2] ~= grant then
      return {'conflict'}
    end
    if known[3] then
      return {'replayed', known[3]}
    end
    -- Somebody began and has not finished; whoever comes goes on with the same session.
    outcome, entry = 'unfinished', known[4]
  end
end
if outcome == 'new' then
  if redis.call('ZCARD', KEYS[1]) >= most then
    return {'full'}
  end
  if digest ~= '' then
    redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
    if redis.call('ZCARD', KEYS[3]) >= most then
      return {'creations_full'}
    end
    local forget_at = now + tonumber(ARGV[8])
    redis.call('DEL', KEYS[4])
    redis.call('HSET', KEYS[4], 'forget_at', forget_at, 'grant', grant, 'entry', entry)
    redis.call('PEXPIRE', KEYS[4], ARGV[8] / 1000)
    redis.call('ZADD', KEYS[3], forget_at, digest)
    outlive(KEYS[3], ARGV[8] / 1000)
  end
end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), entry)
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[4]), entry)
outlive(KEYS[1], tonumber(ARGV[9]))
outlive(KEYS[2], tonumber(ARGV[9]))
return {outcome, now, entry}
