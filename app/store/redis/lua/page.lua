-- Sessions in the order of deadline and id, from one index or from two.
-- KEYS  clock, one index or two
-- ARGV  prefix, now, deadline and id after which to begin, most entries, the status or ''
-- Returns {id, deadline, id, deadline…}.

local deadline, after, most, status = ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local last = status == 'expired' and whole(now) or '+inf'
if (status == 'active' or status == 'paused') and tonumber(deadline) <= now then
  deadline, after = whole(now + 1), ''
end

-- Whether `one` comes after `other`, byte by byte as the engine orders its entries. Lua would
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

-- At most `most` entries of an index, as {id, deadline} each.
local function page(key)
  local found = {}
  if last == '+inf' or tonumber(deadline) <= now then
    for _, entry in ipairs(redis.call('ZRANGEBYSCORE', key, deadline, deadline)) do
      local id = entry:sub(1, ID_CHARS)
      if #found < most and comes_after(id, after) then
        found[#found + 1] = {id, deadline}
      end
    end
  end
  if #found < most then
    local more = redis.call('ZRANGEBYSCORE', key, '(' .. deadline, last, 'WITHSCORES', 'LIMIT', 0,
      most - #found)
    for i = 1, #more, 2 do
      found[#found + 1] = {more[i]:sub(1, ID_CHARS), more[i + 1]}
    end
  end
  return found
end

local function comes_first(one, other)
  if not (one and other) then
    return one
  end
  local a, b = tonumber(one[2]), tonumber(other[2])
  return a < b or (a == b and comes_after(other[1], one[1]))
end

local pages, at, merged = {page(KEYS[2]), KEYS[3] and page(KEYS[3]) or {}}, {1, 1}, {}
while #merged < 2 * most do
  local which = comes_first(pages[1][at[1]], pages[2][at[2]]) and 1 or 2
  local entry = pages[which][at[which]]
  if not entry then
    break
  end
  merged[#merged + 1], merged[#merged + 2] = entry[1], entry[2]
  at[which] = at[which] + 1
end
return merged
