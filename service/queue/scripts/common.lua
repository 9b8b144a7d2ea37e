-- What every script begins with. All keys carry one hash tag, so that those a script makes up lie in the slot of KEYS.
local PREFIX = '{fewstep}:'
local GROUP = 'workers'

-- As service/queue/base.py has them.
local FRESH_MS = 1000
local LATE_MS = 5000

-- Those of service/jobs.py.
local PRIORITIES = {-1, 0, 1}

-- The stream of a model's jobs of one priority. Those of a model are made together, and forgotten together.
local function stream_of(model, priority)
  return PREFIX .. 'jobs:' .. priority .. ':' .. model
end

-- A full Redis refuses a script that begins with what may grow, and nothing after a first write: this one only frees.
local function begin_though_full()
  redis.call('DEL', PREFIX .. 'nothing')
end

-- Does nothing, and is refused where Redis takes no writes. It names a key that is there, as one that is not is refused
-- in a cluster while slots move.
local function begin_by_writing(jobs)
  redis.call('XACK', jobs, GROUP, '0-0')
end

-- The one clock that all hosts share.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- A list of names and values as a table.
local function by_name(list)
  local found = {}
  for k = 1, #list, 2 do
    found[list[k]] = list[k + 1]
  end
  return found
end

-- How fast jobs are finished: row-ticks, and in how many seconds; 0 and 0 where nothing is known.
local function speed_at(key)
  local finished, seconds = unpack(redis.call('HMGET', key, 'finished', 'seconds'))
  return tonumber(finished or 0), tonumber(seconds or 0)
end

-- Milliseconds in which so much of a model is done while there is no other's work, 0 while that is not known.
local function alone_ms(model, cost)
  local finished, seconds, alone = unpack(redis.call('HMGET', PREFIX .. 'speed:' .. model, 'finished', 'seconds', 'alone'))
  return tonumber(finished or 0) > 0 and 1000 * cost * (alone or seconds) / finished or 0
end

-- The milliseconds of work that each other model has.
local function work_of_others(model)
  local work = {}
  for _, other in ipairs(redis.call('SMEMBERS', PREFIX .. 'models')) do
    local outstanding = other ~= model and redis.call('HGET', PREFIX .. 'load:' .. other, 'outstanding')
    if outstanding then
      work[#work + 1] = alone_ms(other, outstanding)
    end
  end
  return work
end

-- Milliseconds that go to others until `own` were for a model: as many to each, or all that it needs.
local function beside_ms(own, others)
  local beside = 0
  for _, work in ipairs(others) do
    beside = beside + math.min(own, work)
  end
  return beside
end

-- Where a load has the cost that waits with a priority.
local function waiting_of(priority)
  return 'waiting:' .. priority
end

-- The cost that waits in a load with a priority of at least so much.
local function waiting_from(load, lowest)
  local waiting = 0
  for _, priority in ipairs(PRIORITIES) do
    if priority >= tonumber(lowest) then
      waiting = waiting + (redis.call('HGET', load, waiting_of(priority)) or 0)
    end
  end
  return waiting
end

-- The consumer group of a stream of jobs; nil where nobody asked for the model lately.
local function group_of(jobs)
  if redis.call('EXISTS', jobs) == 0 then
    return nil
  end
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', jobs)) do
    local group = by_name(info)
    if group.name == GROUP then
      return group
    end
  end
end

-- The oldest entry that waits: those that were given out come before it, up to the last of them.
local function oldest_waiting(jobs, last)
  return redis.call('XRANGE', jobs, '(' .. last, '+', 'COUNT', 1)[1]
end

-- Acknowledged and deleted together: what is only acknowledged would stay in memory. With it goes its cost from what
-- is outstanding. Says whether it was there: a record that is kept outlives the streams.
local function remove(jobs, load, entry)
  local found = redis.call('XRANGE', jobs, entry, entry)[1]
  redis.call('XACK', jobs, GROUP, entry)
  redis.call('XDEL', jobs, entry)
  if found and redis.call('HINCRBY', load, 'outstanding', -by_name(found[2]).cost) <= 0 then
    redis.call('HDEL', load, 'since', 'busy')
  end
  return found ~= nil
end

-- What is left of a job that nobody works on any more: nothing, but for one whose outcome is kept.
local function forget(id)
  local record = PREFIX .. 'job:' .. id
  redis.call('DEL', PREFIX .. 'images:' .. id, PREFIX .. 'preview:' .. id)
  if redis.call('HEXISTS', record, 'kept') == 1 then
    redis.call('HDEL', record, 'message')
  else
    redis.call('DEL', record)
  end
end

-- Takes out a job that waits, if it should have been done a while ago: no worker took it. Its record is left, as whoever
-- asks is told by its deadline. Says whether it did.
local function drop_if_late(jobs, load, priority, entry)
  local fields = by_name(entry[2])
  if now_ms() <= fields.deadline + LATE_MS then
    return false
  end
  remove(jobs, load, entry[1])
  redis.call('HINCRBY', load, waiting_of(priority), -fields.cost)
  forget(fields.id)
  redis.call('HINCRBY', load, 'untaken', 1)
  return true
end

-- Does so with all that wait for a model, so many at a time, up to where none of these is late.
local function drop_late(model, at_a_time)
  for _, priority in ipairs(PRIORITIES) do
    local jobs = stream_of(model, priority)
    local group = group_of(jobs)
    local last = group and group['last-delivered-id']
    while last do
      local entries = redis.call('XRANGE', jobs, '(' .. last, '+', 'COUNT', at_a_time)
      last = nil
      for _, entry in ipairs(entries) do
        if drop_if_late(jobs, PREFIX .. 'load:' .. model, priority, entry) then
          last = entries[#entries][1]
        end
      end
    end
  end
end

-- Whether a job has not failed. One that is late has: no worker does its work, or nobody says that it was done.
local function goes_on_or_done(id)
  local state, deadline = unpack(redis.call('HMGET', PREFIX .. 'job:' .. id, 'state', 'deadline'))
  if state == 'queued' then
    return now_ms() <= tonumber(deadline)
  elseif state == 'running' then
    return now_ms() <= deadline + LATE_MS
  end
  return state == 'done'
end

-- What a client's key names: {2, the job}, or {3} where that one has another digest; nil where it names none.
local function named_by(claim, digest)
  local id, other = unpack(redis.call('HMGET', claim, 'id', 'digest'))
  if id and goes_on_or_done(id) then
    return other == digest and {2, id} or {3}
  end
end

-- Takes an outcome out of those that are kept, by its line in their list.
local function let_go(line)
  redis.call('ZREM', PREFIX .. 'kept-ends', line)
  if redis.call('LREM', PREFIX .. 'kept', 1, line) == 1 then
    local size, id = line:match('^%d+:(%d+):(.*)$')
    redis.call('DECRBY', PREFIX .. 'kept-bytes', size)
    redis.call('DEL', PREFIX .. 'job:' .. id, PREFIX .. 'result:' .. id)
  end
end

-- Whether the outcome of a line is of this moment.
local function is_fresh(line)
  local expires, id = line:match('^(%d+):%d+:(.*)$')
  local kept = redis.call('HGET', PREFIX .. 'job:' .. id, 'kept')
  return kept and math.abs(now_ms() - (expires - kept)) < FRESH_MS
end

-- Puts the outcome of a job beside those that are kept, and lets go of those whose time is over, and of the oldest where
-- these are too many.
local function keep_outcome(id, state, outcome, kept, most, most_bytes)
  local list, ends, bytes = PREFIX .. 'kept', PREFIX .. 'kept-ends', PREFIX .. 'kept-bytes'
  local now = now_ms()
  redis.call('HSET', PREFIX .. 'job:' .. id, 'state', state)
  redis.call('PEXPIRE', PREFIX .. 'job:' .. id, kept)
  redis.call('SET', PREFIX .. 'result:' .. id, outcome, 'PX', kept)
  local line = string.format('%d:%d:%s', now + kept, #outcome, id)
  redis.call('RPUSH', list, line)
  redis.call('ZADD', ends, now + kept, line)
  redis.call('INCRBY', bytes, #outcome)
  for _, over in ipairs(redis.call('ZRANGEBYSCORE', ends, '-inf', now)) do
    let_go(over)
  end
  while redis.call('LLEN', list) > 1 do
    local oldest = redis.call('LINDEX', list, 0)
    local fits = redis.call('LLEN', list) <= tonumber(most) and tonumber(redis.call('GET', bytes)) <= tonumber(most_bytes)
    if fits or is_fresh(oldest) then
      break
    end
    let_go(oldest)
  end
  for _, key in ipairs({list, ends, bytes}) do
    if redis.call('PTTL', key) < tonumber(kept) then
      redis.call('PEXPIRE', key, kept)
    end
  end
end
