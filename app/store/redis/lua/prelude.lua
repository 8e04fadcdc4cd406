-- Runs before every script. All keys of a script are in one cell (app/store/redis/keys.py), whose
-- prefix is ARGV[1]; the keys of sessions are made from it. KEYS[1] is the cell's clock. ARGV[2]
-- is empty, or the time that a test hands in. Instants are microseconds since the epoch.

local PREFIX = ARGV[1]
local ID_CHARS = 36
-- Milliseconds: indexes outlive what they lead to, and the clock the longest failover.
local MARGIN, CLOCK_KEPT = 60000, 604800000

local function whole(number)
  return string.format('%.0f', number)
end

-- The engine's time, since the clocks of callers differ. It never falls behind an instant at which
-- a session was reported as expired, even if a failover brings a clock that is behind.
local held = tonumber(redis.call('GET', KEYS[1]) or 0)
local now
if ARGV[2] ~= '' then
  now = tonumber(ARGV[2])
else
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000000 + tonumber(time[2])
end
now = math.max(now, held)

-- Let a key live at least so much longer. Everything ends by itself, even if no replica is left
-- to remove it.
local function outlive(key, milliseconds)
  if redis.call('PTTL', key) < milliseconds then
    redis.call('PEXPIRE', key, whole(milliseconds))
  end
end

-- Remember that a session with this deadline was reported as expired, or left out as expired.
local function report_expiry(expires)
  if expires > held then
    held = math.max(now, expires)
    redis.call('SET', KEYS[1], whole(held), 'PX', CLOCK_KEPT)
  end
end

-- The same for an index of open sessions, of which those that are expired are left out.
local function report_expired_of(key)
  local last = redis.call('ZREVRANGEBYSCORE', key, whole(now), '-inf', 'WITHSCORES', 'LIMIT', 0, 1)
  if last[2] then
    report_expiry(tonumber(last[2]))
  end
end

-- The session's fields: 't' its terms, packed, then agent and patterns; 'g' the grant as text;
-- 'u' its usage, packed; 'c' who closed or paused it, as text; and one field '=NAME' for each exact tool name.
local TERMS, USAGE = '>ddddddddd', '>dddd'

local function unpack_terms(session, packed)
  local at
  session.created, session.expires, session.closed, session.rev, session.budget, session.rate,
    session.window, session.ceiling, session.paused, at = struct.unpack(TERMS, packed)
  session.agent = packed:sub(at, at + ID_CHARS - 1)
  session.patterns = packed:sub(at + ID_CHARS)
end

local function unpack_usage(session, packed)
  session.made, session.start, session.calls, session.seen = struct.unpack(USAGE, packed)
  -- Time stands still for a session whose last admission is ahead of the clock.
  session.now = math.max(now, session.seen)
end

-- The freeze of an agent, or false: its instant, who froze it and why, with '|' between them.
local function freeze_of(agent)
  return redis.call('HGET', PREFIX .. 'frozen', agent)
end

local function session_key(id)
  return PREFIX .. 'session:' .. id
end

-- The session in a hash, or nil. It may come with more fields, in `more`.
local function load(key, ...)
  local raw = redis.call('HMGET', key, 't', 'u', ...)
  if not raw[1] then
    return nil
  end
  local session = {}
  unpack_terms(session, raw[1])
  unpack_usage(session, raw[2])
  if session.closed < 0 and session.now >= session.expires then
    report_expiry(session.expires)
  end
  return session, raw
end

-- The reply: an outcome, the revision and the usage, and the terms unless the caller has this
-- revision already.
local function reply(outcome, session, key, known_rev)
  local usage = struct.pack(USAGE, session.made, session.start, session.calls, session.now)
  if tonumber(known_rev) == session.rev then
    return {outcome, session.rev, usage, '', '', ''}
  end
  local terms = redis.call('HMGET', key, 't', 'g', 'c')
  return {outcome, session.rev, usage, terms[1], terms[2], terms[3] or ''}
end

-- Keep the indexes in line with a session, and let everything about it live until its end and for
-- `retention` milliseconds more. Paused sessions are among the open ones and have an index of their
-- own beside it. An agent's indexes hold session ids, in the order of deadlines;
-- those of the cell hold the id and the agent's id, so that they can be swept without the session.
local function index(id, session, retention)
  local here, there, ends = 'open', 'closed', session.expires
  if session.closed >= 0 then
    here, there, ends = there, here, math.min(session.closed, ends)
  end
  local life = math.max(MARGIN, math.ceil((ends - now) / 1000) + retention)
  redis.call('PEXPIRE', session_key(id), whole(life))
  redis.call('PEXPIRE', PREFIX .. 'replays:' .. id, whole(life))
  for suffix, entry in pairs({[''] = id .. session.agent, [':' .. session.agent] = id}) do
    redis.call('ZREM', PREFIX .. there .. suffix, entry)
    redis.call('ZADD', PREFIX .. here .. suffix, whole(session.expires), entry)
    outlive(PREFIX .. here .. suffix, life + MARGIN)
    if session.paused >= 0 and session.closed < 0 then
      redis.call('ZADD', PREFIX .. 'paused' .. suffix, whole(session.expires), entry)
      outlive(PREFIX .. 'paused' .. suffix, life + MARGIN)
    elseif session.rev > 1 then
      redis.call('ZREM', PREFIX .. 'paused' .. suffix, entry)
    end
  end
  if session.closed >= 0 then
    redis.call('ZADD', PREFIX .. 'closings', whole(session.closed), id .. session.agent)
    outlive(PREFIX .. 'closings', life + MARGIN)
  end
end
