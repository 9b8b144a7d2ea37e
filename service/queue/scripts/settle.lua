-- Hands over the outcome of a job, and takes it out of the queue. The first call for a job returns 1, later ones 0.
-- KEYS: stream of jobs, record, result, images, dead letters
-- ARGV: id, entry, outcome, ms to keep it, why the job is dead or '', ms to keep dead letters
local jobs, record, result, images, dead = unpack(KEYS)
local id, entry, outcome, keep, reason, keep_dead = unpack(ARGV)

local state, model, message, replies = unpack(redis.call('HMGET', record, 'state', 'model', 'message', 'replies'))
remove(jobs, entry)
redis.call('DEL', record, images)
if state ~= 'running' then
  return 0 -- Settled by another worker, or cancelled.
end
if reason ~= '' then
  local oldest_kept = string.format('%d', now_ms() - keep_dead)
  redis.call('XADD', dead, 'MINID', '~', oldest_kept, '*', 'id', id, 'model', model, 'message', message,
    'reason', reason)
  redis.call('PEXPIRE', dead, keep_dead)
end
redis.call('SET', result, outcome, 'PX', keep)
redis.call('XADD', replies, '*', 'id', id)
redis.call('PEXPIRE', replies, keep)
return 1
