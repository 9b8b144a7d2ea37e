-- How far a job has come whose outcome is kept. KEYS: record, result, and its preview where one is wanted
-- ARGV: farthest position that is told, ms for which a preview is wanted, ms of age that a step of priority is worth
-- Returns {state, row-ticks that have run, of how many, ms to the deadline, note, position or -1, outcome, preview}, nil
-- where nothing is known of it. Numbers are text, but for the position.
local record, result, preview = unpack(KEYS)
local farthest, watch, head_start = unpack(ARGV)

local state, done, cost, deadline, note, kept, model, priority, entry =
  unpack(redis.call('HMGET', record, 'state', 'done', 'cost', 'deadline', 'note', 'kept', 'model', 'priority', 'entry'))
local outcome = redis.call('GET', result)
local over = state ~= 'queued' and state ~= 'running'
if not kept or (over and not outcome) then
  return nil
end

-- How many jobs of another priority, or of the same, wait before this one.
local function waiting_before(other)
  local jobs = stream_of(model, other)
  local group = group_of(jobs)
  if not group then
    return 0
  end
  local ms, count = entry:match('^(%d+)-(%d+)$')
  local first_behind = string.format('(%d-%s', ms + (other - priority) * head_start, count)
  return #redis.call('XRANGE', jobs, '(' .. group['last-delivered-id'], first_behind, 'COUNT', farthest + 1)
end

local position = -1
if state == 'queued' then
  local before = 0
  for _, other in ipairs(PRIORITIES) do
    before = before + waiting_before(other)
  end
  if before <= tonumber(farthest) then
    position = before
  end
end
local shown = false
if preview and not over then
  begin_though_full()
  redis.call('HSET', record, 'watched', now_ms() + watch)
  shown = redis.call('GET', preview)
end
local left = string.format('%d', deadline - now_ms())
return {state, done, cost, left, note, position, outcome, shown}
