-- Decide about calls and count them: rules 1 to 10 of app/domain/admission.py.
-- KEYS  clock, session, replays
-- ARGV  prefix, now, known revision, agent or '', rank of the tier or '', '1' for a dry run,
--       idempotency field or '', the admission as text, then the tools
-- Returns {'idempotency_conflict', usage after the first use of the key}, or what `reply` does; the outcome is 'admitted', 'replayed' or a denial code. For rules 7
-- to 10 also the codes of all that fail, and the positions of unauthorised tools, from 0.

local FIRST = 9
local KEY, REPLAYS, known_rev = KEYS[2], KEYS[3], ARGV[3]
local agent, tier, dry_run = ARGV[4], ARGV[5], ARGV[6] == '1'
local idempotency, admission = ARGV[7], ARGV[8]
local n = #ARGV - FIRST + 1

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

-- The positions of tools that are not authorised. `raw` has the fields of exact names, from 3.
local function unauthorized_positions(session, raw)
  local positions, patterns, known = {}, nil, {}
  for i = 1, n do
    if not raw[i + 2] then
      if not patterns then
        patterns = {}
        for pattern in session.patterns:gmatch('%S+') do
          patterns[#patterns + 1] = split(pattern)
        end
      end
      local name = ARGV[FIRST + i - 1]
      if known[name] == nil then
        known[name] = matches_any(patterns, name)
      end
      if not known[name] then
        positions[#positions + 1] = i - 1
      end
    end
  end
  return positions
end

local fields = {}
for i = 1, n do
  fields[i] = '=' .. ARGV[FIRST + i - 1]
end
local session, raw = load(KEY, unpack(fields))
if not session then
  return {'session_not_found'}
end
local at = session.now
if agent ~= '' and agent ~= session.agent then
  return reply('agent_mismatch', session, KEY, known_rev)
end
if session.closed >= 0 then
  return reply('session_closed', session, KEY, known_rev)
end
if at >= session.expires then
  return reply('session_expired', session, KEY, known_rev)
end
if freeze_of(session.agent) then
  return reply('agent_frozen', session, KEY, known_rev)
end
if session.paused >= 0 then
  return reply('session_paused', session, KEY, known_rev)
end
if idempotency ~= '' then
  local first = redis.call('HGET', REPLAYS, idempotency)
  if first then
    if first:sub(33) ~= admission then
      return {'idempotency_conflict', first:sub(1, 32)}
    end
    session.made, session.start, session.calls, session.now = struct.unpack(USAGE, first)
    return reply('replayed', session, KEY, known_rev)
  end
end
if n == 0 then
  return reply('admitted', session, KEY, known_rev)
end

local elapsed = at >= session.start + session.window
local used = elapsed and 0 or session.calls
local positions = unauthorized_positions(session, raw)
local violations = {}
if session.made + n > session.budget then
  violations[#violations + 1] = 'budget_exceeded'
end
if #positions > 0 then
  violations[#violations + 1] = 'tool_not_authorized'
end
if tier ~= '' and tonumber(tier) > session.ceiling then
  violations[#violations + 1] = 'sensitivity_exceeded'
end
if session.rate >= 0 and used + n > session.rate then
  violations[#violations + 1] = 'rate_limited'
end
if #violations > 0 then
  local denied = reply(violations[1], session, KEY, known_rev)
  denied[7], denied[8] = violations, positions
  return denied
end

session.made, session.calls = session.made + n, used + n
if elapsed then
  session.start = at
end
local admitted = reply('admitted', session, KEY, known_rev)
if not dry_run then
  redis.call('HSET', KEY, 'u', admitted[3])
  if idempotency ~= '' then
    redis.call('HSET', REPLAYS, idempotency, admitted[3] .. admission)
    outlive(REPLAYS, redis.call('PTTL', KEY))
  end
end
return admitted
