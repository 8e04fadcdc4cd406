-- Stands before every script. Instants are microseconds since the epoch.

-- The time of the engine, since clocks of callers differ; ARGV[1] is empty except in tests.
local function clock()
  if ARGV[1] ~= '' then
    return tonumber(ARGV[1])
  end
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- Let a key live at least so long from now. What belongs to a session ends by itself, also
-- when no replica is left to remove it.
local function outlive(key, milliseconds)
  if redis.call('PTTL', key) < milliseconds then
    redis.call('PEXPIRE', key, milliseconds)
  end
end

-- A time to live of zero would remove the key at once, before anybody is told of its end.
local function lifetime(milliseconds)
  return math.ceil(math.max(milliseconds, 1000))
end

-- Entries that were in doubt for longer than their lease.
local function lapsed(key, now)
  return redis.call('ZRANGEBYSCORE', key, '-inf', string.format('%.0f', now))
end

-- How many sessions of an agent are active: those in doubt until their lease ends.
local function count_active(open, doubtful, now)
  local active = redis.call('ZCOUNT', open, string.format('(%.0f', now), '+inf')
  for _, session in ipairs(lapsed(doubtful, now)) do
    local deadline = redis.call('ZSCORE', open, session)
    if deadline and tonumber(deadline) > now then
      active = active - 1
    end
  end
  return active
end
