-- What a creation with an idempotency key was answered.
-- KEYS  clock, the creation of the key
-- ARGV  prefix, now, request digest
-- Returns {'replayed', id, instant, grant}, {'conflict', instant} or {'unknown'}.

local known = redis.call('HMGET', KEYS[2], 'forget_at', 'request', 'id', 'created', 'grant')
if not known[1] or now >= tonumber(known[1]) then
  return {'unknown'}
end
if known[2] ~= ARGV[3] then
  return {'conflict', tonumber(known[4])}
end
return {'replayed', known[3], tonumber(known[4]), known[5]}
