-- Hands over the outcome of a job, and takes it out of the queue. The first call for a job returns 1, or 2 where whoever
-- asked was told by its deadline that it has failed, so that it stays so; later ones return 0, but to the same consumer,
-- which was not told, ten more than the first where that had images, and twenty more where it had not.
-- KEYS: stream of jobs, load, record, result, dead letters
-- ARGV: id, entry, state of a job with this outcome, outcome, ms to keep it where nobody said how long, why the job is
-- dead or '', ms to keep dead letters, bounds on outcomes that are kept and on their bytes,
-- then of the throughput: seconds that it remembers, the shortest stall that counts as one, the surprise, ms to keep it,
-- the seconds of work from which on it is measured, how many ms a worker was at the job, and how many of them behind its
-- last tick; then the outcome of a job that is late, and the consumer
local jobs, load, record, result, dead = unpack(KEYS)
local id, entry, over, outcome, keep, reason, keep_dead, most, most_bytes = unpack(ARGV)
local memory_s, stall_s, surprise, keep_speed, busy_s, worked, finishing, expired, consumer = unpack(ARGV, 10)

-- The milliseconds that count now, where something was finished `since`, and what is finished now `began`.
local function elapsed_ms(since, began, now)
  local paused, resumed = unpack(redis.call('HMGET', load, 'paused', 'resumed'))
  paused, resumed = tonumber(paused or 0), tonumber(resumed or 0)
  if began - since > 1000 * stall_s and began - since <= since - resumed then
    redis.call('HSET', load, 'paused', since, 'resumed', began)
    return now - began
  end
  local worked_on = math.max(0, resumed - math.max(paused, began))
  if worked_on > 0 then
    redis.call('HSET', load, 'resumed', resumed - worked_on)
  end
  return math.max(0, now - since) + worked_on
end

-- The milliseconds for which workers had no room for it whenever something was finished, and have none now.
local function busy_for(busy, now)
  local since = tonumber(redis.call('HGET', load, 'busy') or now)
  if not busy then
    redis.call('HDEL', load, 'busy')
    return 0
  end
  since = math.min(since, now) -- The clock may have gone back.
  redis.call('HSET', load, 'busy', since)
  return now - since
end

-- The throughput of service/queue/admission.py, kept where what every worker finishes is seen.
local function note_finished(model, cost)
  local outstanding, since = unpack(redis.call('HMGET', load, 'outstanding', 'since'))
  if not since then
    return
  end
  local speed = PREFIX .. 'speed:' .. model
  local finished, seconds = speed_at(speed)
  local alone = redis.call('HGET', speed, 'alone') or seconds
  local own = alone_ms(model, outstanding)
  local share = own > 0 and own / (own + beside_ms(own, work_of_others(model))) or 1
  local now = now_ms()
  local never_idle = tonumber(finishing) >= math.max(1000 * busy_s, now - since)
  local alone_s = share * elapsed_ms(tonumber(since), now - math.max(worked, 1000 * busy_s), now) / 1000
  local waiting = waiting_from(load, PRIORITIES[1])
  local busy_ms = busy_for(waiting >= math.max(4 * cost, outstanding - waiting), now)
  redis.call('HSET', load, 'since', now)
  redis.call('PEXPIRE', speed, keep_speed)
  if finished > 0 then
    local enough = busy_ms >= 1000 * busy_s and 0 or 1000 * busy_s
    if own < enough and not (never_idle and 1000 * alone_s > alone_ms(model, cost)) then
      return
    end
    alone_s = math.min(alone_s, math.max(stall_s, surprise * own / 1000))
  end
  local elapsed = alone_s / share
  local remembered = math.exp(-elapsed / memory_s)
  redis.call('HSET', speed, 'finished', finished * remembered + cost, 'seconds', seconds * remembered + elapsed,
    'alone', alone * remembered + alone_s)
  redis.call('PEXPIRE', speed, keep_speed)
end

local settled = PREFIX .. 'settled:' .. id

-- Returns the answer, and notes it for who asks again because it was lost on its way.
local function answered(answer)
  redis.call('SET', settled, answer .. (over == 'done' and 1 or 0) .. consumer, 'PX', keep)
  return answer
end

local state, model, priority, message, replies, kept, cost, deadline = unpack(redis.call('HMGET', record, 'state',
  'model', 'priority', 'message', 'replies', 'kept', 'cost', 'deadline'))
forget(id) -- First, as it only frees: after that a full Redis allows what follows.
if (state == 'running' or state == 'queued') and over == 'done' then
  note_finished(model, cost)
end
local was_there = remove(jobs, load, entry)
if state == 'queued' then -- Redis came back without the take: the outcome is as good as any.
  if was_there then
    redis.call('HINCRBY', load, waiting_of(priority), -cost)
  end
elseif state ~= 'running' then
  local said = redis.call('GET', settled)
  if said and said:sub(3) == consumer then
    return (said:sub(2, 2) == '1' and 10 or 20) + said:sub(1, 1)
  end
  return 0 -- Settled by another worker, or cancelled.
end
if reason ~= '' then
  local oldest_kept = string.format('%d', now_ms() - keep_dead)
  redis.call('XADD', dead, 'MINID', '~', oldest_kept, '*', 'id', id, 'model', model, 'message', message,
    'reason', reason)
  redis.call('PEXPIRE', dead, keep_dead)
end
if kept and now_ms() > deadline + LATE_MS then
  keep_outcome(id, 'failed', expired, kept, most, most_bytes)
  return answered(2)
elseif kept then
  keep_outcome(id, over, outcome, kept, most, most_bytes)
  return answered(1)
end
redis.call('SET', result, outcome, 'PX', keep)
redis.call('XADD', replies, '*', 'id', id)
redis.call('PEXPIRE', replies, keep)
return answered(1)
