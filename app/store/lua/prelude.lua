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
