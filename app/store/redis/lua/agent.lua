-- Freeze an agent, lift its freeze, or leave it; then say how it is.
-- KEYS  clock, the agent's open sessions, its paused sessions
-- ARGV  prefix, now, agent, 'freeze', 'unfreeze' or 'read', who freezes it, why
-- Returns {open sessions with their deadline ahead, the paused ones among them, freeze or ''}.

local agent, verb = ARGV[3], ARGV[4]
if verb == 'freeze' then
  local before = freeze_of(agent)
  local at_and_who = before and before:match('^%d+|[^|]*|') or whole(now) .. '|' .. ARGV[5] .. '|'
  redis.call('HSET', PREFIX .. 'frozen', agent, at_and_who .. ARGV[6])
elseif verb == 'unfreeze' then
  redis.call('HDEL', PREFIX .. 'frozen', agent)
end
report_expired_of(KEYS[2])
local alive = '(' .. whole(now)
return {redis.call('ZCOUNT', KEYS[2], alive, '+inf'), redis.call('ZCOUNT', KEYS[3], alive, '+inf'),
  freeze_of(agent) or ''}
