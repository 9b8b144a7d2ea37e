-- Gives jobs to a consumer: one whose worker fell silent, alone, else those that wait longest.
-- KEYS: streams of jobs, then their loads
-- ARGV: consumer, rows to fill, silence in ms, 1 where the consumer holds jobs
-- Returns {now, jobs, last entry given of each stream}; a job is {number of its stream, entry, id, message, submitted,
-- deadline, tries, 1 where its outcome is kept}. Without the last: there is nothing to wait for until the consumer has settled what it holds.
local consumer, rows, silence, holding = unpack(ARGV)
local streams = #KEYS / 2
local room = tonumber(rows)
local now = now_ms()
local groups, given = {}, {}

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

-- The first entry that a consumer was silent about for too long.
local function abandoned(stream)
  local pending = redis.call('XPENDING', KEYS[stream], GROUP, 'IDLE', silence, '-', '+', 1)[1]
  return pending and pending[1]
end

local function reclaim(stream, id)
  local jobs = KEYS[stream]
  -- From that entry on: the command looks at a few entries only.
  local entry = redis.call('XAUTOCLAIM', jobs, GROUP, consumer, silence, id, 'COUNT', 1)[2][1]
  if entry then -- Redis 6 gives false for an entry that was deleted.
    local tries = redis.call('XPENDING', jobs, GROUP, id, id, 1)[1][4]
    return job_of(stream, entry, 'running', tries)
  end
end

local function older(entry, other)
  local ms, count = entry[1]:match('(%d+)-(%d+)')
  local other_ms, other_count = other[1]:match('(%d+)-(%d+)')
  if ms ~= other_ms then
    return tonumber(ms) < tonumber(other_ms)
  end
  return tonumber(count) < tonumber(other_count)
end

-- The stream whose oldest waiting entry is the oldest of all, and that entry.
local function longest_waiting()
  local stream, oldest
  for k in pairs(groups) do
    local entry = oldest_waiting(KEYS[k], group_of(KEYS[k]))
    if entry and (not oldest or older(entry, oldest)) then
      stream, oldest = k, entry
    end
  end
  return stream, oldest
end

for stream = 1, streams do
  groups[stream] = group_of(KEYS[stream])
end
for stream in pairs(groups) do
  local id = abandoned(stream)
  if id and holding == '1' then
    return {now, {}, {}} -- Comes back for that one with empty hands.
  end
  local job = id and reclaim(stream, id)
  if job then
    return {now, {job}, {}}
  end
end

while room > 0 do
  local stream, entry = longest_waiting()
  if not entry then
    break
  end
  local fields = by_name(entry[2])
  if #given > 0 and tonumber(fields.rows) > room then
    break
  end
  redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', 1, 'STREAMS', KEYS[stream], '>')
  redis.call('HINCRBY', KEYS[streams + stream], 'cost', -fields.cost)
  local job = job_of(stream, entry, 'queued', 1)
  if job then
    given[#given + 1] = job
    room = room - fields.rows
  end
end

local seen = {}
for stream = 1, streams do
  local group = groups[stream] and group_of(KEYS[stream])
  seen[stream] = group and group['last-delivered-id'] or '0-0'
end
return {now, given, seen}
