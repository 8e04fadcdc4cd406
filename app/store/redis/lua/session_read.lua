-- The session as it is now.
-- KEYS  session, grant
-- ARGV  now, '1' to tell the grant
-- Returns what `tell` does: 'found', or {'session_not_found'}.

local session = load(KEYS[1])
if not session then
  return {'session_not_found'}
end
return tell('found', session, ARGV[2] == '1' and KEYS[2] or nil)
