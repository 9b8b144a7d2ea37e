-- The state of each job, nil where it is over. KEYS: their records
local states = {}
for k, record in ipairs(KEYS) do
  states[k] = redis.call('HGET', record, 'state')
end
return states
