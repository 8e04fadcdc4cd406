-- Write a session that the indexes announce; once, however often it is tried.
-- KEYS  session, grant, a mark that it must not be created any more
-- ARGV  now, last instant to begin at, agent, grant as text, time limit in seconds, budget,
--       rate limit or '', window in seconds, rank of the ceiling, retention in milliseconds,
--       patterns, then exact tool names
-- Returns what `tell` does: 'created', 'known' if it was there before, or {'late'}.

local session = load(KEYS[1])
if session then
  session.now = session.created
  return tell('known', session)
end
local now = clock()
if now > tonumber(ARGV[2]) or redis.call('EXISTS', KEYS[3]) == 1 then
  return {'late'}
end
local expires = now + tonumber(ARGV[5]) * 1000000
local fields = {'created', now, 'expires', expires, 'made', 0, 'window_start', now,
  'window_calls', 0, 'seen', now, 'agent', ARGV[3], 'budget', ARGV[6], 'window_secs', ARGV[8],
  'ceiling', ARGV[9], 'patterns', ARGV[11]}
if ARGV[7] ~= '' then
  fields[#fields + 1] = 'rate'
  fields[#fields + 1] = ARGV[7]
end
for i = 12, #ARGV do
  fields[#fields + 1] = 't:' .. ARGV[i]
  fields[#fields + 1] = 1
end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('SET', KEYS[2], ARGV[4])
local life = lifetime(ARGV[5] * 1000 + ARGV[10])
redis.call('PEXPIRE', KEYS[1], life)
redis.call('PEXPIRE', KEYS[2], life)
return tell('created', load(KEYS[1]))
