"""What a batch is in Redis's words: a script for the reads, one for the writes with their outbox entry. Pure.

Scripts and not `MULTI`, because a merge is compare-and-set, and because one reply for many operations
costs a fraction of their time in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from typing import Any, Final, Literal, NamedTuple

from fsm_storage.dialects import Fence
from fsm_storage.outbox import Record, encode_header, encode_key
from fsm_storage.patches import KEEP, Keep

Command = tuple[Any, ...]


class Write(NamedTuple):
    """One write of one part, into the Redis key `name`.

    `expected`: carry it out only where this is the value now (None: where there is none).
    `fence`: only while this lease is in Redis; else the reply is `LOST`.
    """

    name: str
    record: Record
    expected: bytes | Literal[Keep.KEEP] | None = KEEP
    fence: Fence | None = None


class Outbox(NamedTuple):
    """Where a batch announces itself. A full one takes only the names of the keys, into `missed`."""

    stream: str
    missed: str
    is_full: bool = False


class Script:
    """A script, which Redis keeps under its hash until it is restarted or told to forget."""

    def __init__(self, text: str) -> None:
        self._text, self._hash = text, sha1(text.encode(), usedforsecurity=False).hexdigest()

    def command(self, names: Sequence[str], arguments: Sequence[Any] = (), *, whole: bool = False) -> Command:
        """Return the command that runs it. `whole`: with its text, for a Redis that does not have it."""
        head = ("EVAL", self._text) if whole else ("EVALSHA", self._hash)
        return (*head, len(names), *names, *arguments)


READ: Final = Script(
    "local found = {} for i, key in ipairs(KEYS) do found[i] = redis.pcall('GET', key) end return found"
)
READ_IN_SCRIPT: Final = 4
"""Reads from which on the script is faster than as many `GET`. Not `MGET`: to it, a list is nothing."""

# KEYS: stream and missed where there is an outbox, the key of each write, then those of the leases under
# which some of them are made.
# ARGV: the mode and the number of writes; for each write what to do with its TTL, the value expected, the
# value, and what the outbox says of it; then for each lease its token, and which write is made under it.
# The reply for each write: 1, 0 if its lease is lost, or the value found instead of the one expected.
#
# The outbox entry comes before the values: it is the only command that can fail once the comparisons are
# done (out of memory, a stream that is none), and then nothing at all has been written. Values are compared
# as bytes, and merged in Python: Lua's JSON would round integers beyond 2^53.
WRITE: Final = Script("""\
local mode = ARGV[1]
local first = mode == '-' and 1 or 3
local last = first + ARGV[2] - 1
local replies, todo, now, entry, lost = {}, {}, {}, {}, {}
for i = last + 1, #KEYS do
  local at = 3 + ARGV[2] * 4 + (i - last - 1) * 2
  local found, token = redis.pcall('GET', KEYS[i]), ARGV[at] .. ' '
  if type(found) ~= 'string' or string.sub(found, 1, #token) ~= token then lost[tonumber(ARGV[at + 1])] = true end
end
for i = first, last do
  local key, at = KEYS[i], 3 + (i - first) * 4
  local kind, value = string.sub(ARGV[at], 1, 1), ARGV[at + 2]
  local reply = 1
  if kind == 'c' or kind == 'n' then
    local found = now[key]
    if found == nil then found = redis.pcall('GET', key) end
    local expected = kind == 'c' and ARGV[at + 1]
    if found ~= expected then reply = found end
  end
  if lost[i - first] then reply = 0 end
  if reply == 1 then
    if kind == 'd' or (value == '' and kind ~= 's') then value = false end
    now[key] = value
    todo[#todo + 1] = {key, value, string.sub(ARGV[at], 2)}
    entry[#entry + 1] = ARGV[at + 3]
    if mode == 'x' then entry[#entry + 1] = value or '' end
  end
  replies[#replies + 1] = reply
end
if #todo > 0 and mode == 'x' then redis.call('XADD', KEYS[1], '*', unpack(entry)) end
if #todo > 0 and mode == 'm' then redis.call('SADD', KEYS[2], unpack(entry)) end
for _, write in ipairs(todo) do
  if not write[2] then redis.call('DEL', write[1])
  elseif write[3] == '' then redis.call('SET', write[1], write[2])
  else redis.call('SET', write[1], write[2], 'PX', write[3]) end
end
return replies
""")
DONE: Final = 1
LOST: Final = 0

BATCH_SIZE: Final = 512
"""Writes in one script: Redis serves nobody else meanwhile, and Lua's `unpack` ends at 8,000 values."""
BATCH_BYTES: Final = 4 * 1024 * 1024
"""Values in one script, unless one alone has more."""


def write_command(writes: Sequence[Write], outbox: Outbox | None, *, whole: bool = False) -> Command:
    """Return the command that carries out `writes`. `whole`: with the script's text."""
    names: list[str] = [] if outbox is None else [outbox.stream, outbox.missed]
    arguments: list[Any] = ["-" if outbox is None else "m" if outbox.is_full else "x", len(writes)]
    fences = []
    for number, (name, record, expected, fence) in enumerate(writes):
        names.append(name)
        value = record.value
        kind = ("d" if value is None else "s") if expected is KEEP else "n" if expected is None else "c"
        said = "" if outbox is None else _said(record, number, outbox)
        arguments += (
            kind if record.ttl_ms is None else f"{kind}{record.ttl_ms}",
            "" if expected is KEEP or expected is None else expected,
            value or "",
            said,
        )
        if fence is not None:
            fences.append((fence, number))
    for fence, number in fences:
        names.append(fence.key)
        arguments += (fence.token, number)
    return WRITE.command(names, arguments, whole=whole)


def _said(record: Record, number: int, outbox: Outbox) -> str:
    return encode_key(record.key) if outbox.is_full else encode_header(record, number)
