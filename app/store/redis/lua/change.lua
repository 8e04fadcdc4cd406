-- Replace the terms of a session, if they still have the revision that the change was made for.
-- KEYS  clock, session, replays
-- ARGV  prefix, now, session id, revision before, new terms as packed, grant as text, retention
--       in milliseconds, who closed it or '', idempotency field or '', the request as text, then
--       exact tool names
-- Returns {'changed', usage}, {'known', 1 if the key came with this request before, else 0, usage then},
-- {'moved'} if the revision is another one, or {'session_not_found'}.

local id, key = ARGV[3], KEYS[2]
local before, raw = load(key)
if not before then
  return {'session_not_found'}
end
local first = ARGV[9] ~= '' and redis.call('HGET', KEYS[3], ARGV[9])
if first then
  return {'known', first:sub(33) == ARGV[10] and 1 or 0, first:sub(1, 32)}
end
if before.rev ~= tonumber(ARGV[4]) then
  return {'moved'}
end
local session = {}
unpack_terms(session, ARGV[5])
local fields = {'t', ARGV[5], 'g', ARGV[6], 'u', raw[2], 'c', ARGV[8]}
for i = 11, #ARGV do
  fields[#fields + 1] = '=' .. ARGV[i]
  fields[#fields + 1] = ''
end
-- The first write takes no memory, so the engine lets the script finish even when it is out of it.
redis.call('DEL', key)
redis.call('HSET', key, unpack(fields))
if ARGV[9] ~= '' then
  redis.call('HSET', KEYS[3], ARGV[9], raw[2] .. ARGV[10])
end
index(id, session, tonumber(ARGV[7]))
return {'changed', raw[2]}
