-- Keeps a small image of how far a job is. KEYS: preview. ARGV: image, ms to keep it
begin_though_full()
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
