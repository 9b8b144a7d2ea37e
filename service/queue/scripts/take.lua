-- Gives jobs to a consumer: one whose worker fell silent, alone, else those that are first in line.
-- KEYS: streams of jobs, then the load of each, then the speed of each
-- ARGV: consumer, silence in ms, the jobs that the consumer knows it holds as JSON, then the head start of each stream
-- in ms, then the number of the model of each, then how many images of each model there is room for, then for how many
-- ms the jobs of each are left to others
-- Returns {now, jobs, the entry of each stream behind which there may be more to give}; a job is {number of its stream,
-- entry, id, message, submitted, deadline, tries, 1 where its outcome is kept}. Without the last: there is nothing to
-- wait for until the consumer has settled what it holds.
begin_by_writing(KEYS[1])
local consumer, silence = unpack(ARGV)
local held = cjson.decode(ARGV[3])
local streams = #KEYS / 3
local MOST_UNANSWERED = 1000
local models = (#ARGV - 3 - 2 * streams) / 2
local room, patience, begun = {}, {}, {}
for model = 1, models do
  local place = 3 + 2 * streams + model
  room[model], patience[model] = tonumber(ARGV[place]), tonumber(ARGV[place + models])
end
local now = now_ms()
local groups, seen, given = {}, {}, {}

local function model_of(stream)
  return tonumber(ARGV[3 + streams + stream])
end

-- The job of an entry that this consumer has now; nil, and the entry removed, where nobody wants it any more.
local function job_of(stream, entry, wanted, tries)
  local fields = by_name(entry[2])
  local record = PREFIX .. 'job:' .. fields.id
  local state, message, kept = unpack(redis.call('HMGET', record, 'state', 'message', 'kept'))
  if state ~= wanted then
    remove(KEYS[stream], KEYS[streams + stream], entry[1])
    forget(fields.id)
    return nil
  end
  redis.call('HSET', record, 'state', 'running')
  if kept then
    redis.call('HSET', record, 'done', 0)
  end
  return {stream, entry[1], fields.id, message, fields.submitted, fields.deadline, tries, kept and 1 or 0}
end

-- Ms after which this consumer takes what another one was silent about.
local function too_long(stream)
  return silence + patience[model_of(stream)]
end

-- The first entry that a consumer was silent about for too long.
local function abandoned(stream)
  local pending = redis.call('XPENDING', KEYS[stream], GROUP, 'IDLE', too_long(stream), '-', '+', 1)[1]
  return pending and pending[1]
end

local function reclaim(stream, id)
  local jobs = KEYS[stream]
  -- From that entry on: the command looks at a few entries only.
  local entry = redis.call('XAUTOCLAIM', jobs, GROUP, consumer, too_long(stream), id, 'COUNT', 1)[2][1]
  if entry then -- Redis 6 gives false for an entry that was deleted.
    local tries = redis.call('XPENDING', jobs, GROUP, id, id, 1)[1][4]
    return job_of(stream, entry, 'running', tries)
  end
end

-- Adds to `found` what this consumer was given of a stream and does not know of: the answer was lost.
local function unanswered(stream, known, found)
  for _, pending in ipairs(redis.call('XPENDING', KEYS[stream], GROUP, '-', '+', MOST_UNANSWERED, consumer)) do
    local entry = redis.call('XRANGE', KEYS[stream], pending[1], pending[1])[1]
    if entry and not known[by_name(entry[2]).id] then
      begin_though_full()
      found[#found + 1] = job_of(stream, entry, 'running', pending[4])
    end
  end
end

-- Milliseconds until all that was let in of a stream's model is done, 0 while that is not known.
local function backlog(stream)
  local finished, seconds = speed_at(KEYS[2 * streams + stream])
  local outstanding = redis.call('HGET', KEYS[streams + stream], 'outstanding')
  return finished > 0 and 1000 * (outstanding or 0) * seconds / finished or 0
end

-- Whether what waits first in a stream is for others: for a while, and as long as any have jobs of its model.
local function is_for_others(stream, entry)
  local model = model_of(stream)
  if patience[model] == 0 then
    return false
  end
  for k = 1, streams do
    if model_of(k) == model and groups[k] and groups[k].pending > 0 then
      return true
    end
  end
  return now - entry[1]:match('%d+') < patience[model]
end

-- The entry behind the last one that was given of a stream, with its place in the line of service/queue/line.py:
-- before all others by its deadline where that is at risk, else by age and priority.
local function head_behind(stream, last)
  local entry = oldest_waiting(KEYS[stream], last)
  if not entry then
    return nil
  elseif is_for_others(stream, entry) then
    seen[stream] = '$' -- Behind what is there now.
    return nil
  end
  local fields = by_name(entry[2])
  local deadline = tonumber(fields.deadline)
  local at_risk = deadline < now + backlog(stream)
  local rank = at_risk and deadline or fields.submitted - ARGV[3 + stream]
  return {entry = entry, rows = tonumber(fields.rows), cost = fields.cost, at_risk = at_risk, rank = rank}
end

local function priority_of(stream)
  return KEYS[stream]:match(':jobs:(-?%d+):')
end

local function goes_before(head, other)
  if head.at_risk ~= other.at_risk then
    return head.at_risk
  end
  return head.rank < other.rank
end

for stream = 1, streams do
  groups[stream] = group_of(KEYS[stream])
end
local known, found = {}, {}
for _, id in ipairs(held) do
  known[id] = true
end
for stream = 1, streams do
  if groups[stream] then
    unanswered(stream, known, found)
  end
end
if #found > 0 then
  return {now, found, {}}
end
for stream = 1, streams do
  local id = groups[stream] and abandoned(stream)
  if id and #held > 0 then
    return {now, {}, {}} -- Comes back for that one with empty hands.
  end
  local job = id and reclaim(stream, id)
  if job then
    return {now, {job}, {}}
  end
end

local heads = {}
for stream = 1, streams do
  seen[stream] = groups[stream] and groups[stream]['last-delivered-id'] or '0-0'
  heads[stream] = groups[stream] and head_behind(stream, seen[stream])
end
while true do
  local stream
  for k = 1, streams do
    if heads[k] and (not stream or goes_before(heads[k], heads[stream])) then
      stream = k
    end
  end
  if not stream then
    break
  end
  local head, model = heads[stream], model_of(stream)
  if room[model] <= 0 or (begun[model] and head.rows > room[model]) then
    for k = 1, streams do -- None overtakes another of its model.
      heads[k] = model_of(k) ~= model and heads[k] or nil
    end
  else
    redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', 1, 'STREAMS', KEYS[stream], '>')
    redis.call('HINCRBY', KEYS[streams + stream], waiting_of(priority_of(stream)), -head.cost)
    local job = job_of(stream, head.entry, 'queued', 1)
    if job then
      given[#given + 1] = job
      room[model], begun[model] = room[model] - head.rows, true
    end
    seen[stream] = head.entry[1]
    heads[stream] = head_behind(stream, seen[stream])
  end
end
return {now, given, seen}
