-- How much is running in a cell.
-- KEYS  clock, open sessions, paused sessions
-- ARGV  prefix, now
-- Returns {open sessions with their deadline ahead, the paused ones among them, frozen agents}.

report_expired_of(KEYS[2])
local alive = '(' .. whole(now)
return {redis.call('ZCOUNT', KEYS[2], alive, '+inf'), redis.call('ZCOUNT', KEYS[3], alive, '+inf'),
  redis.call('HLEN', PREFIX .. 'frozen')}
