-- Says that a consumer still works on entries. One that went to another meanwhile stays there.
-- KEYS: stream of jobs. ARGV: consumer, entries
local jobs, consumer = KEYS[1], ARGV[1]
if group_of(jobs) then
  for k = 2, #ARGV do
    if #redis.call('XPENDING', jobs, GROUP, ARGV[k], ARGV[k], 1, consumer) > 0 then
      redis.call('XCLAIM', jobs, GROUP, consumer, 0, ARGV[k], 'JUSTID') -- JUSTID: no further try.
    end
  end
end
