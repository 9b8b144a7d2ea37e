-- Gives a job up. KEYS: record, result, images. ARGV: id, what others learn who wait for it, ms to keep that
-- Returns the stage that it had reached, or nil where it is over.
local record, result, images = unpack(KEYS)
local id, outcome, keep = unpack(ARGV)

redis.call('DEL', result)
local state, model, entry, cost, replies = unpack(redis.call('HMGET', record, 'state', 'model', 'entry', 'cost', 'replies'))
if state == 'queued' then
  remove(PREFIX .. 'jobs:' .. model, entry)
  redis.call('HINCRBY', PREFIX .. 'load:' .. model, 'cost', -cost)
  redis.call('DEL', record, images)
elseif state == 'running' then
  redis.call('HSET', record, 'state', 'cancelled') -- Its worker sees that, and settles.
else
  return nil
end
if outcome ~= '' then
  redis.call('SET', result, outcome, 'PX', keep)
  redis.call('XADD', replies, '*', 'id', id)
  redis.call('PEXPIRE', replies, keep)
end
return state
