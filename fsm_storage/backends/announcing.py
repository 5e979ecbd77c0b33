"""Scripts that look at both parts of a conversation before they speak of them in the outbox. Pure.

An edit compares both parts with what its page showed. An announcement says in the outbox what the parts
are now, for a mirror that has missed something. Each is one step for Redis: were a value read by one
command and announced by the next, a write in between would be overtaken by an older one in the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from aiogram.fsm.storage.base import StorageKey

from fsm_storage.backends.wire import run_script
from fsm_storage.backends.writing import Script
from fsm_storage.outbox import DATA, STATE, Record, encode_header, encode_key
from fsm_storage.patches import KEEP, Keep

PARTS: Final = (STATE, DATA)

# The header of a record of the outbox (see `outbox`): `tail` is what stands behind the TTL.
_HEADER = """\
local function ttl_of(key)
  local ttl = redis.call('PTTL', key)
  return ttl == 0 and 1 or ttl
end
local function header(number, part, value, ttl, tail)
  return '[' .. number .. ',"' .. (value and '' or '-') .. part .. '",'
    .. ((not value or ttl < 0) and 'null' or string.format('%.0f', ttl)) .. ',' .. tail
end
"""

# KEYS: stream, then state and data. ARGV: the tail, then for each part: "c" and the value expected, or "n"
# for none, or "-" for any; "k" (keep), "d" (delete) or "s" and the value; the TTL: "k" (keep), "" (none) or
# milliseconds; the TTL of a part that was not there. The reply: the entry's id, or the part that differs.
EDIT: Final = Script(f"""\
{_HEADER}
local tail, parts, todo, entry = ARGV[1], {{'state', 'data'}}, {{}}, {{}}
for i, part in ipairs(parts) do
  local key, at = KEYS[i + 1], 2 + (i - 1) * 6
  local found = redis.pcall('GET', key)
  local expected = ARGV[at]
  if (expected == 'c' and found ~= ARGV[at + 1]) or (expected == 'n' and found) then return i end
  local action, ttl = ARGV[at + 2], ARGV[at + 4]
  if action ~= 'k' or ttl ~= 'k' then
    local value = action == 's' and ARGV[at + 3]
    if action == 'k' then value = found end
    if ttl == 'k' then
      ttl = found and ttl_of(key) or tonumber(ARGV[at + 5])
    else
      ttl = tonumber(ttl) or -1
    end
    if type(value) == 'string' or found then
      todo[#todo + 1] = {{key, value, ttl}}
      entry[#entry + 1] = header(#todo - 1, part, value, ttl, tail)
      entry[#entry + 1] = value or ''
    end
  end
end
if #todo == 0 then return '' end
local id = redis.call('XADD', KEYS[1], '*', unpack(entry))
for _, write in ipairs(todo) do
  if not write[2] then redis.call('DEL', write[1])
  elseif write[3] < 0 then redis.call('SET', write[1], write[2])
  else redis.call('SET', write[1], write[2], 'PX', string.format('%.0f', write[3])) end
end
return id
""")

# KEYS: stream, missed, then state and data of each conversation. ARGV: the tail and the name in `missed`
# of each. The reply: how many parts could be announced; one of another type cannot.
ANNOUNCE: Final = Script(f"""\
{_HEADER}
local parts, entry, names, count = {{'state', 'data'}}, {{}}, {{}}, 0
for at = 1, #ARGV, 2 do
  for i, part in ipairs(parts) do
    local key = KEYS[1 + at + i]
    local value = redis.pcall('GET', key)
    if type(value) ~= 'table' then
      entry[#entry + 1] = header(count, part, value, value and ttl_of(key) or -1, ARGV[at])
      entry[#entry + 1] = value or ''
      count = count + 1
    end
  end
  names[#names + 1] = ARGV[at + 1]
end
if count > 0 then redis.call('XADD', KEYS[1], '*', unpack(entry)) end
redis.call('SREM', KEYS[2], unpack(names))
return count
""")

# KEYS: the stream, then the keys to fill. ARGV: the last id that the stream gave out when the values were
# read ("" where there is no stream), then value and TTL ("" none) of each. The reply: how many were missing,
# and are set; -1 if something was written meanwhile, which may be why a key is missing.
RESTORE: Final = Script("""\
local last = ''
if redis.call('EXISTS', KEYS[1]) == 1 then
  local facts = redis.call('XINFO', 'STREAM', KEYS[1])
  for i = 1, #facts, 2 do if facts[i] == 'last-generated-id' then last = facts[i + 1] end end
end
if last ~= ARGV[1] then return -1 end
local count = 0
for i = 2, #KEYS do
  local key = KEYS[i]
  if redis.call('EXISTS', key) == 0 then
    local value, ttl = ARGV[2 * i - 2], ARGV[2 * i - 1]
    if ttl == '' then redis.call('SET', key, value) else redis.call('SET', key, value, 'PX', ttl) end
    count = count + 1
  end
end
return count
""")


class Change(NamedTuple):
    """What an edit does to a part.

    `expected`: the value it must have (None: none; KEEP: any). `value`: None removes it. `ttl_ms`: None is
    for ever, KEEP is what it has, or `first_ttl_ms` where there is nothing yet.
    """

    expected: bytes | Literal[Keep.KEEP] | None = KEEP
    value: str | Literal[Keep.KEEP] | None = KEEP
    ttl_ms: int | Literal[Keep.KEEP] | None = KEEP
    first_ttl_ms: int | None = None

    def arguments(self) -> tuple[Any, ...]:
        expected, value, ttl, first = self
        check = ("-", "") if expected is KEEP else ("n", "") if expected is None else ("c", expected)
        action = ("k", "") if value is KEEP else ("d", "") if value is None else ("s", value)
        return (
            *check, *action,
            "k" if ttl is KEEP else "" if ttl is None else ttl,
            -1 if first is None else first,
        )  # fmt: skip


def edit_command(
    stream: str, names: Sequence[str], key: StorageKey, changes: Sequence[Change], source: str, actor: str
) -> tuple[Script, Sequence[str], Sequence[Any]]:
    """Return the script, the keys and the arguments of an edit; `names` and `changes` are of state and data."""
    arguments = [argument for change in changes for argument in change.arguments()]
    return EDIT, [stream, *names], [_tail(key, source, actor), *arguments]


def announcement(
    stream: str, missed: str, conversations: Sequence[tuple[StorageKey, str, str]], source: str
) -> tuple[Script, Sequence[str], Sequence[Any]]:
    """Return the script that announces conversations: each a key, and its names for the state and the data."""
    names = [name for _, *pair in conversations for name in pair]
    arguments = [text for key, *_ in conversations for text in (_tail(key, source, ""), encode_key(key))]
    return ANNOUNCE, [stream, missed, *names], arguments


def _tail(key: StorageKey, source: str, actor: str) -> str:
    return encode_header(Record(key, STATE, None, source=source, actor=actor)).split(",", 3)[3]


async def run(wire: Any, script: Script, names: Sequence[str], arguments: Sequence[Any]) -> Any:
    """Run a script, by its text if Redis does not have it. Raises what Redis answers it with."""
    return await run_script(lambda whole: wire.ask([script.command(names, arguments, whole=whole)]))
