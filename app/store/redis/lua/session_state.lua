-- Stands before the scripts about one session.

local FIELDS = {'created', 'expires', 'made', 'window_start', 'window_calls', 'closed', 'seen',
  'agent', 'budget', 'rate', 'window_secs', 'ceiling', 'patterns'}

-- The session in the hash `key`, as numbers, or nil.
local function load(key)
  local raw = redis.call('HMGET', key, unpack(FIELDS))
  if not raw[1] then
    return nil
  end
  local session = {}
  for i, field in ipairs(FIELDS) do
    session[field] = raw[i] or nil
  end
  for _, field in ipairs({'created', 'expires', 'made', 'window_start', 'window_calls',
      'closed', 'seen', 'budget', 'rate', 'window_secs', 'ceiling'}) do
    session[field] = session[field] and tonumber(session[field])
  end
  -- After a failover the clock can be behind what a caller was told. It is held still.
  session.now = math.max(clock(), session.seen)
  return session
end

-- What a caller is told: an outcome and the session, with its grant if he asked for it.
local function tell(outcome, session, grant_key, violations, unauthorized)
  return {outcome, session.now, session.created, session.expires, session.made,
    session.window_start, session.window_calls, session.closed or '',
    grant_key and redis.call('GET', grant_key) or '', violations or {}, unauthorized or {}}
end
