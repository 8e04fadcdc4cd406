-- Create a session: its key, the agent's cap, the session and its indexes, in one step.
-- KEYS  clock, session, the agent's open sessions, the creation of an idempotency key
-- ARGV  prefix, now, session id, terms as packed with an instant of 0, grant as text, lifetime in
--       microseconds, retention in milliseconds, cap or '', '1' if the store is full, '1' if it
--       remembers too many creations of the caller, request digest or '', caller, how long to
--       remember in microseconds, agent, then exact tool names
-- Returns {'created', instant}, {'frozen'}, {'replayed', id, instant, grant}, {'conflict', instant}, {'full'},
-- {'creations_full'} or {'too_many', active}.

local id, remember = ARGV[3], ARGV[11] ~= ''
if freeze_of(ARGV[14]) then
  return {'frozen'}
end
local known = remember and redis.call('HMGET', KEYS[4], 'forget_at', 'request', 'id', 'created',
  'grant')
if known and known[1] and now < tonumber(known[1]) then
  if known[2] ~= ARGV[11] then
    return {'conflict', tonumber(known[4])}
  end
  return {'replayed', known[3], tonumber(known[4]), known[5]}
end
if ARGV[9] == '1' then
  return {'full'}
end
if remember and ARGV[10] == '1' then
  return {'creations_full'}
end
if ARGV[8] ~= '' then
  local active = redis.call('ZCOUNT', KEYS[3], '(' .. whole(now), '+inf')
  report_expired_of(KEYS[3])
  if active >= tonumber(ARGV[8]) then
    return {'too_many', active}
  end
end

local session = {}
unpack_terms(session, ARGV[4])
session.created, session.expires = now, now + tonumber(ARGV[6])
local fields = {
  't', struct.pack('>dd', session.created, session.expires) .. ARGV[4]:sub(17),
  'g', ARGV[5],
  'u', struct.pack(USAGE, 0, now, 0, now),
}
for i = 15, #ARGV do
  fields[#fields + 1] = '=' .. ARGV[i]
  fields[#fields + 1] = ''
end
redis.call('HSET', KEYS[2], unpack(fields))
index(id, session, tonumber(ARGV[7]))
if remember then
  local forget_at, kept = whole(now + tonumber(ARGV[13])), tonumber(ARGV[13]) / 1000
  redis.call('HSET', KEYS[4], 'forget_at', forget_at, 'request', ARGV[11], 'id', id, 'created',
    whole(now), 'grant', ARGV[5])
  redis.call('PEXPIRE', KEYS[4], whole(kept))
  if redis.call('ZADD', PREFIX .. 'creations', forget_at, KEYS[4] .. ARGV[12]) == 1 then
    redis.call('HINCRBY', PREFIX .. 'creators', ARGV[12], 1)
  end
  outlive(PREFIX .. 'creations', kept + MARGIN)
  outlive(PREFIX .. 'creators', kept + MARGIN)
end
return {'created', now}
