-- Announce a session to its agent, if the cap allows one more.
-- KEYS  open sessions of the agent, those in doubt
-- ARGV  now, session, time limit in microseconds, lease in microseconds, cap or '',
--       milliseconds that the index is to live
-- Returns {'ok'} or {'too_many_sessions', active}.

local now, session = clock(), ARGV[2]
-- It may have been announced before, by somebody who did not finish.
redis.call('ZREM', KEYS[1], session)
local active = count_active(KEYS[1], KEYS[2], now)
if ARGV[5] ~= '' and active >= tonumber(ARGV[5]) then
  redis.call('ZREM', KEYS[2], session)
  return {'too_many_sessions', active}
end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), session)
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[4]), session)
outlive(KEYS[1], tonumber(ARGV[6]))
outlive(KEYS[2], tonumber(ARGV[6]))
return {'ok'}
