-- Notes how far jobs have come. KEYS: their records. ARGV: row-ticks that have run of each
for k, record in ipairs(KEYS) do
  if redis.call('HGET', record, 'state') == 'running' then
    redis.call('HSET', record, 'done', ARGV[k])
  end
end
