-- Close a session.
-- KEYS  session, grant, replays
-- ARGV  now, '1' to leave an expired one alone, retention in milliseconds
-- Returns what `tell` does: 'closed', 'session_closed' if it was closed before,
-- 'session_expired' if it was left alone, or {'session_not_found'}.

local session = load(KEYS[1])
if not session then
  return {'session_not_found'}
end
if session.closed then
  return tell('session_closed', session)
end
if ARGV[2] == '1' and session.now >= session.expires then
  return tell('session_expired', session)
end
redis.call('HSET', KEYS[1], 'closed', session.now, 'seen', session.now)
session.closed = session.now
local life = lifetime(math.min(redis.call('PTTL', KEYS[1]), tonumber(ARGV[3])))
for _, key in ipairs(KEYS) do
  redis.call('PEXPIRE', key, life)
end
return tell('closed', session)
