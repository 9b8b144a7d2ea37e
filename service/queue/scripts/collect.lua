-- What became of jobs. KEYS: the record and the result of each
-- Returns for each its outcome; or 1 where it goes on, 0 where nothing is known of it.
local found = {}
for k = 1, #KEYS, 2 do
  found[#found + 1] = redis.call('GET', KEYS[k + 1]) or redis.call('EXISTS', KEYS[k])
end
return found
