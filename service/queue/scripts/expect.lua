-- Notes how fast the jobs of a model should be finished, unless that was measured.
-- KEYS: speed. ARGV: row-ticks, in how many seconds, ms to keep that
begin_though_full()
if redis.call('HSETNX', KEYS[1], 'seconds', ARGV[2]) == 1 then
  redis.call('HSET', KEYS[1], 'finished', ARGV[1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
