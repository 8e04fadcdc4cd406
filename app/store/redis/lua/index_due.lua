-- Entries that somebody has to look at, for one replica at a time: those in doubt whose lease has
-- ended, and those of sessions that ended long enough ago.
-- KEYS  all sessions, entries in doubt, closed sessions, closings, remembered creations, the
--       sweeping replica
-- ARGV  now, retention in microseconds, most entries, this replica, its turn in milliseconds
-- Returns {entry, kind, entry, kind…}: 'doubtful', 'closed' or 'expired'.

local now, most = clock(), tonumber(ARGV[3])
local turn = redis.call('GET', KEYS[6])
if turn and turn ~= ARGV[4] then
  return {}
end
redis.call('SET', KEYS[6], ARGV[4], 'PX', ARGV[5])
redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now)

local due, known = {}, {}
local function take(index, last, doubtful)
  local found = redis.call('ZRANGEBYSCORE', index, '-inf', string.format('%.0f', last),
    'LIMIT', 0, most)
  for _, entry in ipairs(found) do
    if #due < 2 * most and not known[entry] then
      known[entry] = true
      due[#due + 1] = entry
      due[#due + 1] = doubtful and 'doubtful'
        or redis.call('ZSCORE', KEYS[3], entry) and 'closed' or 'expired'
    end
  end
end
take(KEYS[2], now, true)
take(KEYS[1], now - tonumber(ARGV[2]), false)
take(KEYS[4], now - tonumber(ARGV[2]), false)
return due
