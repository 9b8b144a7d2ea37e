-- What every script begins with. All keys carry one hash tag, so that those a script makes up lie in the slot of KEYS.
local PREFIX = '{fewstep}:'
local GROUP = 'workers'

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

-- The oldest entry that waits: those that were given out come before it.
local function oldest_waiting(jobs, group)
  return redis.call('XRANGE', jobs, '(' .. group['last-delivered-id'], '+', 'COUNT', 1)[1]
end

-- Acknowledged and deleted together: what is only acknowledged would stay in memory.
local function remove(jobs, entry)
  redis.call('XACK', jobs, GROUP, entry)
  redis.call('XDEL', jobs, entry)
end
