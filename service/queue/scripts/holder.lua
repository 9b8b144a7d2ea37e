-- Which job a client's key names. KEYS: claim. ARGV: digest
-- Returns {2, the job}, or {3} where that one has another digest; nil where it names none.
return named_by(KEYS[1], ARGV[1])
