-- Accepts a job, or says that there is no room for its cost, or that it would come too late.
-- KEYS: stream of jobs, load, record of the job, models, and the claim where the job has a key
-- ARGV: id, model, message, cost, rows, bound on cost, age in ms, ms to the deadline, ms to keep it all, reply stream,
-- then where its outcome is kept: ms to keep that, note, digest
-- Returns {1}; or {0, cost that waits, row-ticks taken, in how many seconds}; or {2, the job that has the key}; or {3}
-- where that one has another digest.
local jobs, load, record, models, claim = unpack(KEYS)
local id, model, message, cost, rows, bound, age, left, keep, replies, kept, note, digest = unpack(ARGV)

if claim then
  local holder, other = unpack(redis.call('HMGET', claim, 'id', 'digest'))
  local state = holder and holder ~= id and redis.call('HGET', PREFIX .. 'job:' .. holder, 'state')
  if state and state ~= 'failed' and state ~= 'cancelled' then
    return other == digest and {2, holder} or {3}
  end
end
if redis.call('EXISTS', record) == 1 then
  return {1} -- Accepted before; the answer was lost on its way.
end
if redis.call('EXISTS', jobs) == 0 then
  redis.call('DEL', load)
  redis.call('XGROUP', 'CREATE', jobs, GROUP, '0', 'MKSTREAM')
end

local waiting = tonumber(redis.call('HGET', load, 'cost') or 0)
local drained, seconds = unpack(redis.call('HMGET', load, 'drained', 'seconds'))
drained, seconds = drained or '0', seconds or '0'
-- One that would come too late behind the others, as fast as they are taken, is refused: better now than then. A quarter
-- is added, for jobs that were taken and then given up make the queue look faster than it is.
local late = tonumber(drained) > 0 and 1250 * (waiting + cost) * seconds / drained > tonumber(left)
if waiting > 0 and (waiting + cost > tonumber(bound) or late) then
  return {0, waiting, drained, seconds}
end

local now = now_ms()
local entry = redis.call('XADD', jobs, '*', 'id', id, 'cost', cost, 'rows', rows,
  'submitted', now - age, 'deadline', now + left)
redis.call('HINCRBY', load, 'cost', cost)
redis.call('HSET', record, 'state', 'queued', 'model', model, 'message', message, 'entry', entry, 'cost', cost,
  'replies', replies)
redis.call('PEXPIRE', record, keep + (kept or 0))
if kept then
  redis.call('HSET', record, 'kept', kept, 'note', note, 'deadline', now + left, 'done', 0)
end
if claim then
  redis.call('HSET', claim, 'id', id, 'digest', digest)
  redis.call('PEXPIRE', claim, keep + kept)
end
redis.call('SADD', models, model)
-- A model that nobody asks for any more is forgotten with its last job.
for _, key in ipairs({jobs, load, models}) do
  if redis.call('PTTL', key) < tonumber(keep) then
    redis.call('PEXPIRE', key, keep)
  end
end
return {1}
