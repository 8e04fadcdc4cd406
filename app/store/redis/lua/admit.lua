-- Decide about calls and count them: rules 1 to 8 of app/domain/admission.py.
-- KEYS  session, grant, replays
-- ARGV  now, agent or '', rank of the tier or '', '1' for a dry run, '1' to tell the grant,
--       idempotency field or '', the admission as text, then the tools
-- Returns what `tell` does: the outcome is 'admitted', 'replayed' or a denial code; for rules
-- 5 to 8 all codes that apply, and the places of unauthorised tools, from 0.

local FIRST_TOOL = 8
local agent, tier, dry_run = ARGV[2], ARGV[3], ARGV[4] == '1'
local grant_key = ARGV[5] == '1' and KEYS[2] or nil
local idempotency, admission = ARGV[6], ARGV[7]
local n = #ARGV - FIRST_TOOL + 1

local function split(pattern)
  local pieces = {}
  for piece in (pattern .. '*'):gmatch('([^*]*)%*') do
    pieces[#pieces + 1] = piece
  end
  return pieces
end

-- Whether `name` is the pieces in order with anything between them. The leftmost place for each
-- middle piece leaves the most room for those after it.
local function matches(pieces, name)
  local first, last = pieces[1], pieces[#pieces]
  local at, stop = #first + 1, #name - #last
  if at - 1 > stop or name:sub(1, #first) ~= first or name:sub(stop + 1) ~= last then
    return false
  end
  for i = 2, #pieces - 1 do
    local from, to = name:find(pieces[i], at, true)
    if not from or to > stop then
      return false
    end
    at = to + 1
  end
  return true
end

local function matches_any(patterns, name)
  for _, pieces in ipairs(patterns) do
    if matches(pieces, name) then
      return true
    end
  end
  return false
end

local function unauthorized_places(text)
  local fields, places, patterns, known = {}, {}, {}, {}
  for i = FIRST_TOOL, #ARGV do
    fields[#fields + 1] = 't:' .. ARGV[i]
  end
  local exact = redis.call('HMGET', KEYS[1], unpack(fields))
  for pattern in text:gmatch('%S+') do
    patterns[#patterns + 1] = split(pattern)
  end
  for i = 1, n do
    local name = ARGV[FIRST_TOOL + i - 1]
    if known[name] == nil then
      known[name] = exact[i] and true or matches_any(patterns, name)
    end
    if not known[name] then
      places[#places + 1] = i - 1
    end
  end
  return places
end

local session = load(KEYS[1])
if not session then
  return {'session_not_found'}
end
local now = session.now
if agent ~= '' and agent ~= session.agent then
  return tell('agent_mismatch', session, grant_key)
end
if session.closed then
  return tell('session_closed', session, grant_key)
end
if now >= session.expires then
  if session.seen < session.expires and not dry_run then
    -- What has been told to be over stays over, whatever clock a failover brings.
    redis.call('HSET', KEYS[1], 'seen', now)
  end
  return tell('session_expired', session, grant_key)
end
if idempotency ~= '' then
  local known = redis.call('HGET', KEYS[3], idempotency)
  if known then
    local as_of, made, start, calls, first = known:match('^(%d+) (%d+) (%d+) (%d+) (.*)$')
    if first ~= admission then
      return {'idempotency_conflict'}
    end
    session.now, session.made = tonumber(as_of), tonumber(made)
    session.window_start, session.window_calls = tonumber(start), tonumber(calls)
    return tell('replayed', session, grant_key)
  end
end
if n == 0 then
  return tell('admitted', session, grant_key)
end

local elapsed = now >= session.window_start + session.window_secs * 1000000
local used = elapsed and 0 or session.window_calls
local unauthorized = unauthorized_places(session.patterns)
local violations = {}
if session.made + n > session.budget then
  violations[#violations + 1] = 'budget_exceeded'
end
if #unauthorized > 0 then
  violations[#violations + 1] = 'tool_not_authorized'
end
if tier ~= '' and tonumber(tier) > session.ceiling then
  violations[#violations + 1] = 'sensitivity_exceeded'
end
if session.rate and used + n > session.rate then
  violations[#violations + 1] = 'rate_limited'
end
if #violations > 0 then
  return tell(violations[1], session, grant_key, violations, unauthorized)
end

session.made, session.window_calls = session.made + n, used + n
if elapsed then
  session.window_start = now
end
if not dry_run then
  redis.call('HSET', KEYS[1], 'made', session.made, 'window_start', session.window_start,
    'window_calls', session.window_calls, 'seen', now)
  if idempotency ~= '' then
    redis.call('HSET', KEYS[3], idempotency, string.format('%.0f %.0f %.0f %.0f %s', now,
      session.made, session.window_start, session.window_calls, admission))
    outlive(KEYS[3], redis.call('PTTL', KEYS[1]))
  end
end
return tell('admitted', session, grant_key)
