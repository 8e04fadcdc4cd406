-- How many sessions are active.
-- KEYS  all sessions, entries in doubt, closed sessions
-- ARGV  now

local now = clock()
local after = string.format('(%.0f', now)
local active = redis.call('ZCOUNT', KEYS[1], after, '+inf')
  - redis.call('ZCOUNT', KEYS[3], after, '+inf')
for _, entry in ipairs(lapsed(KEYS[2], now)) do
  local deadline = redis.call('ZSCORE', KEYS[1], entry)
  if deadline and tonumber(deadline) > now and not redis.call('ZSCORE', KEYS[3], entry) then
    active = active - 1
  end
end
return active
