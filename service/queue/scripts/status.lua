-- How far a job has come whose outcome is kept. KEYS: record, result. ARGV: farthest position that is told
-- Returns {state, row-ticks that have run, of how many, ms to the deadline, note, position or -1, outcome}, nil where
-- nothing is known of it. Numbers are text, but for the position.
local record, result = unpack(KEYS)

local state, done, cost, deadline, note, kept, model, entry =
  unpack(redis.call('HMGET', record, 'state', 'done', 'cost', 'deadline', 'note', 'kept', 'model', 'entry'))
local outcome = redis.call('GET', result)
local over = state ~= 'queued' and state ~= 'running'
if not kept or (over and not outcome) then
  return nil
end
local position = -1
if state == 'queued' then
  local jobs = PREFIX .. 'jobs:' .. model
  local group = group_of(jobs)
  local before = group
    and redis.call('XRANGE', jobs, '(' .. group['last-delivered-id'], '(' .. entry, 'COUNT', ARGV[1] + 1)
  if before and #before <= tonumber(ARGV[1]) then
    position = #before
  end
end
local left = string.format('%d', deadline - now_ms())
return {state, done, cost, left, note, position, outcome}
