-- Announce a session to its agent, if the cap allows one more.
-- KEYS  open sessions of the agent
-- ARGV  now, session, lease in microseconds, cap or '', milliseconds that the index is to live
-- Returns {'ok'} or {'too_many_sessions', active}.

local now = clock()
local active = redis.call('ZCOUNT', KEYS[1], string.format('(%.0f', now), '+inf')
local own = redis.call('ZSCORE', KEYS[1], ARGV[2])
if own and tonumber(own) > now then
  active = active - 1
end
if ARGV[4] ~= '' and active >= tonumber(ARGV[4]) then
  return {'too_many_sessions', active}
end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), ARGV[2])
outlive(KEYS[1], tonumber(ARGV[5]))
return {'ok'}
