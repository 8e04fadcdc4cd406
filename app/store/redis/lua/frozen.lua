-- The frozen agents of a cell.
-- KEYS  clock
-- ARGV  prefix, now
-- Returns {agent, freeze, agent, freeze, ...}.

return redis.call('HGETALL', PREFIX .. 'frozen')
