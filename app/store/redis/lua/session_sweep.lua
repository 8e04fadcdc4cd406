-- Remove a session that ended long enough ago.
-- KEYS  session, grant, replays, a mark that it must not be created any more
-- ARGV  now, retention in microseconds
-- Returns {'gone'}, {'expired'} or {'closed'} if it was removed and had ended so, or else
-- what `tell` does: 'alive'.

local session = load(KEYS[1])
if not session then
  -- Whoever has announced it and still wants to write it comes too late for the indexes.
  redis.call('SET', KEYS[4], 1, 'PX', 60000)
  return {'gone'}
end
local ended = math.min(session.closed or session.expires, session.expires)
if ended + tonumber(ARGV[2]) > session.now then
  return tell('alive', session)
end
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3])
return {session.closed and 'closed' or 'expired'}
