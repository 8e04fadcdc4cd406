-- Sessions of the agent are about to be closed. From now on they count for a short lease only,
-- so that none keeps the cap used up if nobody goes on; and they stay in reach.
-- KEYS  open sessions of the agent
-- ARGV  now, lease in microseconds, the session, or '' for all
-- Returns the sessions.

local until_then = clock() + tonumber(ARGV[2])
if ARGV[3] ~= '' then
  redis.call('ZADD', KEYS[1], 'XX', 'LT', until_then, ARGV[3])
  return {ARGV[3]}
end
local sessions = redis.call('ZRANGE', KEYS[1], 0, -1)
for _, session in ipairs(sessions) do
  redis.call('ZADD', KEYS[1], 'XX', 'LT', until_then, session)
end
return sessions
