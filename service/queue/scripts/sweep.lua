-- Forgets consumers that hold nothing: this one, and those that were silent for long. One that lives comes back.
-- KEYS: stream of jobs. ARGV: consumer, silence in ms
begin_by_writing(KEYS[1])
if group_of(KEYS[1]) then
  for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], GROUP)) do
    local consumer = by_name(info)
    if consumer.pending == 0 and (consumer.name == ARGV[1] or consumer.idle > tonumber(ARGV[2])) then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[1], GROUP, consumer.name)
    end
  end
end
