-- Close active and paused sessions of an agent.
-- KEYS  clock, the agent's open sessions
-- ARGV  prefix, now, most sessions, retention in milliseconds, who closes them
-- Returns {ids closed, number looked at}. If it looked at the most, there may be more.

local ids = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. whole(now), '+inf', 'LIMIT', 0, ARGV[3])
local closed = {}
for _, id in ipairs(ids) do
  local key = session_key(id)
  local packed = redis.call('HGET', key, 't')
  if packed then
    local session = {}
    unpack_terms(session, packed)
    session.closed, session.rev = now, session.rev + 1
    -- The first write, PEXPIRE, takes no memory; the engine then lets the script finish even when
    -- it is out of memory.
    index(id, session, tonumber(ARGV[4]))
    redis.call('HSET', key, 't', struct.pack(TERMS, session.created, session.expires,
      session.closed, session.rev, session.budget, session.rate, session.window,
      session.ceiling, session.paused) .. packed:sub(73), 'c', ARGV[5])
    closed[#closed + 1] = id
  end
end
-- Sessions left out as expired must not come back to life.
report_expired_of(KEYS[2])
return {closed, #ids}
