"""What Redis or Valkey runs as one step. Each script keeps to the keys of one partition group, which share a hash tag,
so that it runs on a cluster, too. It checks first and writes then: a script that was refused has changed nothing."""

from __future__ import annotations

MAKE_META = """
-- KEYS: meta   ARGV: fields and values          Makes a store where there is none; returns whether it did.
-- An id alone is no store: an earlier version wrote it by itself first, and may have died after it.
for _, field in ipairs({'format', 'unfinished'}) do
  if redis.call('HEXISTS', KEYS[1], field) == 1 then return 0 end
end
redis.call('HSET', KEYS[1], unpack(ARGV))
return 1
"""

CLAIM = """
-- KEYS: owners                                  ARGV: epoch, token, segment, partitions
-- Makes "epoch:token" the owner of the partitions; refused where one has an owner of a later epoch.
local epoch = tonumber(ARGV[1])
for i = 4, #ARGV do
  local held = redis.call('HGET', KEYS[1], ARGV[i])
  if held then
    local other = tonumber(string.match(held, '^(%d+):'))
    if other > epoch then return {'STALE', tostring(other)} end
  end
end
for i = 4, #ARGV do
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[1] .. ':' .. ARGV[2])
end
redis.call('HSET', KEYS[1], 'writes:' .. ARGV[3], '0')
return {'OK'}
"""

WRITE = """
-- KEYS  owners, counters, population, requests, event ids, then producers, then rows
-- ARGV   1 owner   2 segment   3 writes so far   4 milliseconds that rows stay, 0 for ever   5 that producers stay
--        6 number of partitions   7 number of producers   8 population   9 new users
--       10 requests, 11 how many, 12 the most to keep, 13 the oldest to keep (s)
--       14 event ids, 15 how many, 16 the most to keep, 17 the oldest to keep (s)
--       then the partitions; for each producer how many fields and values follow, and these; then the rows
local partitions, producers = tonumber(ARGV[6]), tonumber(ARGV[7])
local at = 17
for _, held in ipairs(redis.call('HMGET', KEYS[1], unpack(ARGV, at + 1, at + partitions))) do
  if not held then return {'EMPTIED'} end
  if held ~= ARGV[1] then return {'FENCED', held} end
end
local writes = redis.call('HGET', KEYS[1], 'writes:' .. ARGV[2])
if writes ~= ARGV[3] then return {'BEHIND', writes or ''} end
redis.call('HSET', KEYS[1], 'writes:' .. ARGV[2], tostring(tonumber(ARGV[3]) + 1))
at = at + partitions
if ARGV[8] ~= '' then redis.call('HSET', KEYS[3], ARGV[2], ARGV[8]) end
if ARGV[9] ~= '0' then redis.call('HINCRBY', KEYS[2], 'users:' .. ARGV[2], ARGV[9]) end
for n = 1, producers do
  local count = tonumber(ARGV[at + 1])
  redis.call('HSET', KEYS[5 + n], unpack(ARGV, at + 2, at + 1 + count))
  redis.call('PEXPIRE', KEYS[5 + n], ARGV[5])
  at = at + 1 + count
end
-- Chunks: u4 seconds since 1970, u4 how many it holds, what it holds. The oldest go first.
local function append(key, name, chunk, count, most, oldest)
  if count == 0 then return end
  redis.call('RPUSH', key, chunk)
  local held = redis.call('HINCRBY', KEYS[2], name, count)
  for i = 1, 64 do
    if redis.call('LLEN', key) == 1 then return end
    local seconds, size = struct.unpack('<I4I4', redis.call('LINDEX', key, 0))
    if held <= most and seconds >= oldest then return end
    redis.call('LPOP', key)
    held = redis.call('HINCRBY', KEYS[2], name, -size)
  end
end
append(KEYS[4], 'requests', ARGV[10], tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13]))
append(KEYS[5], 'event ids', ARGV[14], tonumber(ARGV[15]), tonumber(ARGV[16]), tonumber(ARGV[17]))
local first = 5 + producers
for n = 1, #KEYS - first do
  if ARGV[4] == '0' then
    redis.call('SET', KEYS[first + n], ARGV[at + n])
  else
    redis.call('SET', KEYS[first + n], ARGV[at + n], 'PX', ARGV[4])
  end
end
return {'OK'}
"""

RAISE_EPOCH = """
-- KEYS: epoch   ARGV: epoch                      Epochs never go back.
local held = tonumber(redis.call('GET', KEYS[1]) or '0')
if tonumber(ARGV[1]) > held then redis.call('SET', KEYS[1], ARGV[1]) end
return 1
"""

LEASE = """
-- KEYS: lease   ARGV: who, milliseconds          Takes or renews the lease; returns who else has it.
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""

RELEASE = """
-- KEYS: lease   ARGV: who
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""
