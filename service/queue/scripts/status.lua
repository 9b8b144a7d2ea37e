-- How far a job has come whose outcome is kept. KEYS: record, result, and its preview where one is wanted
-- ARGV: farthest position that is told, ms for which a preview is wanted
-- Returns {state, row-ticks that have run, of how many, ms to the deadline, note, position or -1, outcome, preview}, nil
-- where nothing is known of it. Numbers are text, but for the position.
local record, result, preview = unpack(KEYS)
local farthest, watch = unpack(ARGV)

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
    and redis.call('XRANGE', jobs, '(' .. group['last-delivered-id'], '(' .. entry, 'COUNT', farthest + 1)
  if before and #before <= tonumber(farthest) then
    position = #before
  end
end
local shown = false
if preview and not over then
  redis.call('HSET', record, 'watched', now_ms() + watch)
  shown = redis.call('GET', preview)
end
local left = string.format('%d', deadline - now_ms())
return {state, done, cost, left, note, position, outcome, shown}
