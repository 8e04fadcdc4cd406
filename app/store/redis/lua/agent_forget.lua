-- Sessions of the agent are gone.
-- KEYS  open sessions of the agent, those in doubt, closed ones
-- ARGV  now, the sessions

for i = 2, #ARGV do
  for _, key in ipairs(KEYS) do
    redis.call('ZREM', key, ARGV[i])
  end
end
return 1
