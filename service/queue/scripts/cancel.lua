-- Gives a job up. KEYS: record, result
-- ARGV: id, what others learn who wait for it, ms to keep that, bounds on outcomes that are kept and on their bytes
-- Returns the stage that it had reached, or nil where it is over.
local record, result = unpack(KEYS)
local id, outcome, keep, most, most_bytes = unpack(ARGV)

local state, model, priority, entry, cost, replies, kept =
  unpack(redis.call('HMGET', record, 'state', 'model', 'priority', 'entry', 'cost', 'replies', 'kept'))
begin_though_full()
if not kept then
  redis.call('DEL', result)
end
if state == 'queued' then
  local load = PREFIX .. 'load:' .. model
  if remove(stream_of(model, priority), load, entry) then
    redis.call('HINCRBY', load, waiting_of(priority), -cost)
  end
  forget(id)
elseif state == 'running' then
  redis.call('HSET', record, 'state', 'cancelled') -- Its worker sees that, and settles.
else
  return nil
end
if kept then
  keep_outcome(id, 'cancelled', outcome, kept, most, most_bytes)
elseif outcome ~= '' then
  redis.call('SET', result, outcome, 'PX', keep)
  redis.call('XADD', replies, '*', 'id', id)
  redis.call('PEXPIRE', replies, keep)
end
return state
