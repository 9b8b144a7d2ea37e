-- What waits for all models together. KEYS: models
-- Returns {jobs, cost, ms that the oldest has waited, how many no worker took in time since this was last asked}.
redis.call('SREM', KEYS[1], 'nothing') -- Refused by a Redis that takes no writes, which is no queue.
local depth, cost, oldest, untaken = 0, 0, 0, 0
local now = now_ms()
for _, model in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local load, known = PREFIX .. 'load:' .. model, false
  drop_late(model, 100)
  for _, priority in ipairs(PRIORITIES) do
    local jobs = stream_of(model, priority)
    local group = group_of(jobs)
    if group then
      known = true
      depth = depth + redis.call('XLEN', jobs) - group.pending
      local entry = oldest_waiting(jobs, group['last-delivered-id'])
      if entry then
        oldest = math.max(oldest, now - by_name(entry[2]).submitted)
      end
    end
  end
  if known then
    cost = cost + waiting_from(load, PRIORITIES[1])
    untaken = untaken + (redis.call('HGET', load, 'untaken') or 0)
    redis.call('HDEL', load, 'untaken')
  else
    redis.call('SREM', KEYS[1], model)
  end
end
return {depth, cost, oldest, untaken}
