-- Hands over the outcome of a job, and takes it out of the queue. The first call for a job returns 1, later ones 0.
-- KEYS: stream of jobs, record, result, dead letters
-- ARGV: id, entry, state of a job with this outcome, outcome, ms to keep it where nobody said how long, why the job is
-- dead or '', ms to keep dead letters, bounds on outcomes that are kept and on their bytes
local jobs, record, result, dead = unpack(KEYS)
local id, entry, over, outcome, keep, reason, keep_dead, most, most_bytes = unpack(ARGV)

local state, model, message, replies, kept =
  unpack(redis.call('HMGET', record, 'state', 'model', 'message', 'replies', 'kept'))
remove(jobs, entry)
forget(id)
if state ~= 'running' then
  return 0 -- Settled by another worker, or cancelled.
end
if reason ~= '' then
  local oldest_kept = string.format('%d', now_ms() - keep_dead)
  redis.call('XADD', dead, 'MINID', '~', oldest_kept, '*', 'id', id, 'model', model, 'message', message,
    'reason', reason)
  redis.call('PEXPIRE', dead, keep_dead)
end
if kept then
  keep_outcome(id, over, outcome, kept, most, most_bytes)
  return 1
end
redis.call('SET', result, outcome, 'PX', keep)
redis.call('XADD', replies, '*', 'id', id)
redis.call('PEXPIRE', replies, keep)
return 1
