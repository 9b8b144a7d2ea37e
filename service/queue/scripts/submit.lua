-- Accepts a job, or says when it should come back because there is no room, or not in time.
-- KEYS: load, promises, record of the job, models, and the claim where the job has a key
-- ARGV: id, model, message, images or '', cost, rows, age in ms, ms to the deadline, ms to keep it all, reply stream, what recognises
-- the request, priority, 1 for who asks and is not let in; then of the door: bound on cost, margin, newcomers' part,
-- what others' work takes of the room, pace, shortest and farthest wait in ms, ms that a promise is kept, the most
-- promises; then where its outcome is kept: ms to keep that, note, digest
-- Returns {1} to who is let in, or would be; or {0, whole seconds until it should come back}; or {2, the job that has
-- the key}; or {3} where that one has another digest.
local load, promises, record, models, claim = unpack(KEYS)
local id, model, message, images, cost, rows, age, left, keep, replies, identity, priority, asks = unpack(ARGV)
local bound, margin, newcomers, beside, pace, shortest, farthest, promise_kept, most = unpack(ARGV, 14, 22)
local kept, note, digest = unpack(ARGV, 23)

local named = claim and named_by(claim, digest)
if named and named[2] ~= id then
  return named
end
if redis.call('EXISTS', record) == 1 then
  return {1} -- Accepted before; the answer was lost on its way.
end
-- A full Redis refuses what may grow, but not once a script has written: so these come first, here and below.
local streams = {}
for k, each in ipairs(PRIORITIES) do
  streams[k] = stream_of(model, each)
end
local fresh = redis.call('EXISTS', unpack(streams)) == 0
if fresh and asks == '1' then
  return {1}
end
for _, stream in ipairs(streams) do
  if redis.call('EXISTS', stream) == 0 then
    redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
  end
end
if fresh then
  redis.call('DEL', load)
end
drop_late(model, 10)

local now = now_ms()

-- Where the load has the time from which on those of a priority are promised one.
local function next_promise_of(other)
  return 'next_promise:' .. other
end

-- That time, 0 where it is not known: one so far ahead is from before the clock went back.
local function next_promise(other)
  local at = tonumber(redis.call('HGET', load, next_promise_of(other)) or 0)
  return at <= now + 2 * farthest and at or 0
end

local outstanding = tonumber(redis.call('HGET', load, 'outstanding') or 0)
local waiting = waiting_from(load, PRIORITIES[1])
-- What goes before this one: all that workers have, and what waits with its priority or a higher one.
local before = outstanding - waiting + waiting_from(load, priority)
local ms_per_cost = alone_ms(model, 1) -- 0 while nothing is known
local others = work_of_others(model)

-- Milliseconds until `own` were for this model.
local function shared_ms(own)
  return own + beside_ms(own, others)
end

-- Milliseconds until there is room if nobody else comes, not above 0 where there is now.
local function missing_ms(share)
  local over = waiting > 0 and waiting + cost - math.min(1, share * 2 ^ priority) * bound or 0
  if ms_per_cost == 0 then
    return over > 0 and tonumber(shortest) or 0
  end
  local own = (before + cost) * ms_per_cost
  local room = left / margin - beside * beside_ms(own, others)
  local late = before > 0 and own - share * room or 0
  return shared_ms(math.max(over * ms_per_cost, late))
end

-- The whole seconds to the time that is promised.
local function promise(earliest)
  local at = math.max(next_promise(priority), earliest)
  local wait_s = math.ceil((at - now) / 1000)
  redis.call('ZREMRANGEBYSCORE', promises, '-inf', now - promise_kept)
  redis.call('ZREMRANGEBYSCORE', promises, '(' .. now + farthest, '+inf') -- The clock went back.
  redis.call('ZREM', promises, identity)
  if identity == '' or wait_s * 1000 > tonumber(farthest) or redis.call('ZCARD', promises) >= tonumber(most) then
    return math.min(wait_s, farthest / 1000)
  end
  redis.call('ZADD', promises, now + wait_s * 1000, identity)
  redis.call('PEXPIRE', promises, farthest + promise_kept)
  if ms_per_cost > 0 then
    -- No later than what `next_promise` takes for a time; so far ahead nobody is promised one anyway.
    local behind = math.min(at + shared_ms(cost * ms_per_cost) / pace, now + 2 * farthest)
    for _, other in ipairs(PRIORITIES) do
      if other <= tonumber(priority) then
        redis.call('HSET', load, next_promise_of(other), math.max(next_promise(other), behind))
      end
    end
  end
  return wait_s
end

-- The door of service/queue/admission.py, kept where all that ask to be let in are seen.
local due = tonumber(redis.call('ZSCORE', promises, identity) or nil)
if due and (due <= now - promise_kept or due > now + farthest) then
  due = nil
end
local in_turn = due and due <= now
local missing = missing_ms(in_turn and 1 or tonumber(newcomers))
if missing > 0 then
  if due and not in_turn then
    return {0, math.ceil((due - now) / 1000)}
  end
  return {0, promise(now + math.max(shortest, missing))}
end

if asks == '1' then
  return {1}
end
if images ~= '' then
  redis.call('SET', PREFIX .. 'images:' .. id, images, 'PX', keep)
end
redis.call('SADD', models, model)
local entry = redis.call('XADD', stream_of(model, priority), '*', 'id', id, 'cost', cost, 'rows', rows,
  'submitted', now - age, 'deadline', now + left)
redis.call('ZREM', promises, identity)
if outstanding <= 0 then
  -- Nobody came for a while: what was promised for later hinders nobody.
  redis.call('HSET', load, 'since', now)
  for _, other in ipairs(PRIORITIES) do
    redis.call('HSET', load, next_promise_of(other), now)
  end
end
redis.call('HINCRBY', load, waiting_of(priority), cost)
redis.call('HINCRBY', load, 'outstanding', cost)
redis.call('HSET', record, 'state', 'queued', 'model', model, 'priority', priority, 'message', message, 'entry', entry,
  'cost', cost, 'replies', replies)
redis.call('PEXPIRE', record, keep + (kept or 0))
if kept then
  redis.call('HSET', record, 'kept', kept, 'note', note, 'deadline', now + left, 'done', 0)
end
if claim then
  redis.call('HSET', claim, 'id', id, 'digest', digest)
  redis.call('PEXPIRE', claim, keep + kept)
end
-- A model that nobody asks for any more is forgotten with its last job.
for _, key in ipairs({load, models, unpack(streams)}) do
  if redis.call('PTTL', key) < tonumber(keep) then
    redis.call('PEXPIRE', key, keep)
  end
end
return {1}
