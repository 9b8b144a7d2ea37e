-- Takes a token out of the bucket of an API key. KEYS: bucket. ARGV: tokens that it holds, ms in which one comes back
-- Returns 0 where there was one, else the ms until there is. The bucket is the time at which it will be full again.
local LONGEST = 1e12 -- More than any key is used for, and still a number of ms that Redis takes.
local size, interval = tonumber(ARGV[1]), tonumber(ARGV[2])
local now = now_ms()
local stored = tonumber(redis.call('GET', KEYS[1]) or 0)
-- Never emptier than empty, as it would be where the clock went back or the rate was raised.
local full = math.max(now, math.min(stored, now + size * interval))
local wait = full + interval - now - size * interval
if wait < 0.1 then -- What is left of a wait for a whole token is rounding: times have steps of 2^-12 ms.
  wait, full = 0, full + interval
end
if full ~= stored then
  begin_though_full()
  local keep = math.max(1, math.min(full - now, LONGEST))
  redis.call('SET', KEYS[1], string.format('%.17g', full), 'PX', string.format('%.0f', math.ceil(keep)))
end
return math.ceil(math.max(0, math.min(wait, LONGEST)))
