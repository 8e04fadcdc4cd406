-- Remove sessions of a cell that ended long enough ago, and creations to be forgotten.
-- KEYS  clock
-- ARGV  prefix, now, retention in microseconds, most to remove
-- Returns {expired, closed, creations}.

local cutoff, left = whole(now - tonumber(ARGV[3])), tonumber(ARGV[4])
local removed = {0, 0, 0}

local function due(name, until_)
  return redis.call('ZRANGEBYSCORE', PREFIX .. name, '-inf', until_, 'LIMIT', 0, left)
end

for which, name in ipairs({'open', 'closed', 'closings'}) do
  if left > 0 then
    for _, entry in ipairs(due(name, cutoff)) do
      local id, agent = entry:sub(1, ID_CHARS), entry:sub(ID_CHARS + 1)
      redis.call('UNLINK', session_key(id), PREFIX .. 'replays:' .. id)
      redis.call('ZREM', PREFIX .. 'closings', entry)
      for _, index in ipairs({'open', 'closed', 'paused'}) do
        redis.call('ZREM', PREFIX .. index, entry)
        redis.call('ZREM', PREFIX .. index .. ':' .. agent, id)
      end
      local kind = which == 1 and 1 or 2
      removed[kind], left = removed[kind] + 1, left - 1
    end
  end
end
if left > 0 then
  -- The key of a creation, then its caller.
  local key_chars = #PREFIX + #'creation:' + 64
  for _, entry in ipairs(due('creations', whole(now))) do
    local caller = entry:sub(key_chars + 1)
    redis.call('UNLINK', entry:sub(1, key_chars))
    redis.call('ZREM', PREFIX .. 'creations', entry)
    if redis.call('HINCRBY', PREFIX .. 'creators', caller, -1) <= 0 then
      redis.call('HDEL', PREFIX .. 'creators', caller)
    end
    removed[3] = removed[3] + 1
  end
end
return removed
