-- Takes a token out of the bucket of an API key. KEYS: bucket. ARGV: tokens that it holds, ms in which one comes back
-- Returns 0 where there was one, else the ms until there is. The bucket is the time at which it will be full again.
local LONGEST = 1e12 -- More than any key is used for, and still a number of ms that Redis takes.
local size, interval = tonumber(ARGV[1]), tonumber(ARGV[2])
local now = now_ms()
local full = math.max(now, tonumber(redis.call('GET', KEYS[1]) or 0)) + interval
local wait = full - now - size * interval
if wait > 0 then
  return math.ceil(math.min(wait, LONGEST))
end
begin_though_full()
local keep = math.max(1, math.min(full - now, LONGEST))
redis.call('SET', KEYS[1], string.format('%.17g', full), 'PX', string.format('%.0f', math.ceil(keep)))
return 0
