-- What waits for all models together. KEYS: models, jobs that no worker took in time
-- Returns {jobs, cost, ms that the oldest has waited, how many no worker took in time since this was last asked}.
begin_though_full() -- So that a Redis that takes no writes is no queue.
local depth, cost, oldest = 0, 0, 0
local now = now_ms()
for _, model in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  drop_late(model, 100)
  local known = false
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
    cost = cost + waiting_from(PREFIX .. 'load:' .. model, PRIORITIES[1])
  else
    redis.call('SREM', KEYS[1], model)
  end
end
local untaken = tonumber(redis.call('GET', KEYS[2]) or 0)
redis.call('DEL', KEYS[2])
return {depth, cost, oldest, untaken}
