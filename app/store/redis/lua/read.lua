-- Sessions as they are now.
-- KEYS  clock
-- ARGV  prefix, now, then id and known revision of each
-- Returns what `reply` does for each: 'found', or {'session_not_found'}.

local found = {}
for i = 3, #ARGV, 2 do
  local key = session_key(ARGV[i])
  local session = load(key)
  found[#found + 1] = session and reply('found', session, key, ARGV[i + 1])
    or {'session_not_found'}
end
return found
