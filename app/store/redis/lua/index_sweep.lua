-- Forget sessions that are gone.
-- KEYS  all sessions, entries in doubt, closed sessions, closings
-- ARGV  now, the entries

for i = 2, #ARGV do
  for _, key in ipairs(KEYS) do
    redis.call('ZREM', key, ARGV[i])
  end
end
return 1
