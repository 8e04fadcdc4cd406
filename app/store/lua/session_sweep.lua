-- Remove a session that ended long enough ago.
-- KEYS  session, grant, replays
-- ARGV  now, retention in microseconds
-- Returns {'gone'}, {'expired'} or {'closed'} if it was removed and had ended so, or else
-- what `tell` does: 'alive'.

local session = load(KEYS[1])
if not session then
  return {'gone'}
end
local ended = math.min(session.closed or session.expires, session.expires)
if ended + tonumber(ARGV[2]) > session.now then
  return tell('alive', session)
end
redis.call('UNLINK', unpack(KEYS))
return {session.closed and 'closed' or 'expired'}
