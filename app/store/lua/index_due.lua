-- Entries of sessions that ended long enough ago, for one replica at a time to look at.
-- KEYS  all sessions, closings, remembered creations, the sweeping replica
-- ARGV  now, retention in microseconds, most entries, this replica, its turn in milliseconds
-- Returns the entries.

local now, most = clock(), tonumber(ARGV[3])
local turn = redis.call('GET', KEYS[4])
if turn and turn ~= ARGV[4] then
  return {}
end
redis.call('SET', KEYS[4], ARGV[4], 'PX', ARGV[5])
local cutoff = string.format('%.0f', now - tonumber(ARGV[2]))
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', cutoff, 'LIMIT', 0, most)
local known = {}
for _, entry in ipairs(due) do
  known[entry] = true
end
if #due < most then
  local closed = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', cutoff, 'LIMIT', 0, most)
  for _, entry in ipairs(closed) do
    if #due < most and not known[entry] then
      due[#due + 1] = entry
    end
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
return due
