-- How many sessions of the agent are active.
-- KEYS  open sessions of the agent, those in doubt
-- ARGV  now

return count_active(KEYS[1], KEYS[2], clock())
