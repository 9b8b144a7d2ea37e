-- Puts a job that a consumer was given behind those that wait.
-- KEYS: stream of jobs, load, record. ARGV: consumer, entry
-- Returns 1 where it waits now, 0 where it is no longer this consumer's.
local jobs, load, record = unpack(KEYS)
local consumer, entry = unpack(ARGV)

local state, priority, cost = unpack(redis.call('HMGET', record, 'state', 'priority', 'cost'))
if state == 'queued' then
  return 1 -- Done before; the answer was lost on its way.
end
if state ~= 'running' or #redis.call('XPENDING', jobs, GROUP, entry, entry, 1, consumer) == 0 then
  return 0
end
begin_though_full()
local fields = redis.call('XRANGE', jobs, entry, entry)[1][2]
redis.call('XACK', jobs, GROUP, entry)
redis.call('XDEL', jobs, entry)
redis.call('HSET', record, 'state', 'queued', 'entry', redis.call('XADD', jobs, '*', unpack(fields)))
redis.call('HINCRBY', load, waiting_of(priority), cost)
return 1
