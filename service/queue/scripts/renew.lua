-- Says that a consumer still works on entries.
-- KEYS: stream of jobs. ARGV: consumer, entries
if group_of(KEYS[1]) then
  local claim = {'XCLAIM', KEYS[1], GROUP, ARGV[1], 0}
  for k = 2, #ARGV do
    claim[#claim + 1] = ARGV[k]
  end
  claim[#claim + 1] = 'JUSTID' -- So that it counts as no further try.
  redis.call(unpack(claim))
end
