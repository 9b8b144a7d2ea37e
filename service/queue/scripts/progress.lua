-- Notes how far jobs have come. KEYS: their records. ARGV: row-ticks that have run of each
-- Returns for each 1 where previews of it are wanted, else 0.
begin_though_full()
local wanted = {}
local now = now_ms()
for k, record in ipairs(KEYS) do
  local state, watched = unpack(redis.call('HMGET', record, 'state', 'watched'))
  wanted[k] = 0
  if state == 'running' then
    redis.call('HSET', record, 'done', ARGV[k])
    if watched and tonumber(watched) > now then
      wanted[k] = 1
    end
  end
end
return wanted
