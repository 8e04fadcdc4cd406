-- Entries in the order of their deadline, of one index or of two.
-- KEYS  the indexes
-- ARGV  now, deadline and entry after which to begin, '1' for those before now only, '1' for
--       those after now only, most entries
-- Returns for each index: {entry, deadline, entry, deadline…}.

local now, most = clock(), tonumber(ARGV[6])
local deadline, after = ARGV[2], ARGV[3]
local last = ARGV[4] == '1' and string.format('%.0f', now) or '+inf'
if ARGV[5] == '1' and tonumber(deadline) <= now then
  deadline, after = string.format('%.0f', now + 1), ''
end

-- Whether `one` comes after `other`, byte by byte as the engine orders its entries; Lua would
-- compare by the language of the machine.
local function comes_after(one, other)
  for i = 1, math.min(#one, #other) do
    local a, b = one:byte(i), other:byte(i)
    if a ~= b then
      return a > b
    end
  end
  return #one > #other
end

local function page(index)
  local found = {}
  if last == '+inf' or tonumber(deadline) <= now then
    for _, entry in ipairs(redis.call('ZRANGEBYSCORE', index, deadline, deadline)) do
      if comes_after(entry, after) and #found < 2 * most then
        found[#found + 1] = entry
        found[#found + 1] = deadline
      end
    end
  end
  local rest = most - #found / 2
  if rest > 0 then
    local more = redis.call('ZRANGEBYSCORE', index, '(' .. deadline, last, 'WITHSCORES',
      'LIMIT', 0, rest)
    for _, value in ipairs(more) do
      found[#found + 1] = value
    end
  end
  return found
end

local pages = {}
for i, index in ipairs(KEYS) do
  pages[i] = page(index)
end
return pages
