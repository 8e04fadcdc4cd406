-- How much a cell holds, and how much of it is due to be removed.
-- KEYS  clock
-- ARGV  prefix, now, retention in microseconds
-- Returns {sessions, due, {caller, remembered creations, ...}}.

local cutoff, sum = whole(now - tonumber(ARGV[3])), 0
for _, name in ipairs({'open', 'closed', 'closings'}) do
  sum = sum + redis.call('ZCOUNT', PREFIX .. name, '-inf', cutoff)
end
sum = sum + redis.call('ZCOUNT', PREFIX .. 'creations', '-inf', whole(now))
return {redis.call('ZCARD', PREFIX .. 'open') + redis.call('ZCARD', PREFIX .. 'closed'),
  sum, redis.call('HGETALL', PREFIX .. 'creators')}
