-- Notes how fast the jobs of a model should be finished, unless that was measured.
-- KEYS: load. ARGV: row-ticks, in how many seconds
if redis.call('EXISTS', KEYS[1]) == 1 and redis.call('HSETNX', KEYS[1], 'seconds', ARGV[2]) == 1 then
  redis.call('HSET', KEYS[1], 'finished', ARGV[1])
end
