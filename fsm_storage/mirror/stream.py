"""The outbox as the mirror reads it: through a consumer group, from which nothing is taken before it is applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from fsm_storage.backends.wire import Wire, run_script
from fsm_storage.backends.writing import Script
from fsm_storage.mirror.applying import Entry
from fsm_storage.outbox import aside_name, id_of, missed_name, stream_name

GROUP = "mirror"
BATCH = 500
"""Entries that are applied together at the most."""
BATCH_BYTES = 1024 * 1024
"""Bytes of values in them, unless the last one has more. Redis serves nobody else while a script reads them."""
BLOCK_MS = 250
ASIDE = 10_000

# KEYS: the outbox, and the set of what was missed. ARGV: the group, the consumer, after which id (or `>`: what
# nobody was given), how many entries and bytes. XREADGROUP by itself counts entries only, and one may have
# megabytes. The reply: the time before, how many were missed then, the entries, and whether there were no more.
_READ = Script("""\
local time, missed = redis.call('TIME'), redis.call('SCARD', KEYS[2])
local found, size, start, is_all = {}, 0, ARGV[3], 0
while #found < tonumber(ARGV[4]) and size < tonumber(ARGV[5]) do
  local reply = redis.call(
    'XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', 1, 'STREAMS', KEYS[1], start)
  local entry = reply and reply[1] and reply[1][2][1]
  if not entry then is_all = 1 break end
  found[#found + 1] = entry
  if start ~= '>' then start = entry[1] end
  for _, item in ipairs(entry[2] or {}) do size = size + #item end
end
return {time, missed, found, is_all}
""")


class Found(NamedTuple):
    """What was read of the outbox at `now_ms`. With these, all has been read that was written before `all_until`."""

    now_ms: int
    entries: Sequence[Entry] = ()
    all_until: int | None = None


class Stream:
    """The outbox of an alias, on a wire."""

    def __init__(self, wire: Wire, alias: str, consumer: str) -> None:
        self._wire, self._consumer = wire, consumer
        self._name, self._missed, self._aside = stream_name(alias), missed_name(alias), aside_name(alias)

    async def make_group(self) -> bool:
        """Make the stream and its group; say whether there was none."""
        (reply,) = await self._wire.ask([("XGROUP", "CREATE", self._name, GROUP, "0", "MKSTREAM")])
        if isinstance(reply, ResponseError) and "BUSYGROUP" in str(reply):
            return False
        checked(reply)
        return True

    async def go_on_behind(self, version: int) -> None:
        """Let a new stream go on behind what the database has.

        Or a Redis that was wiped, and whose clock is behind, would give out versions that look old.
        """
        # Refused where the stream is further already. What came in before the group was made has older ids.
        await self._wire.ask([("XSETID", self._name, id_of(version))])

    async def take_over(self) -> None:
        """Make everything ours that a dead mirror was given. Whoever has the lease may do so at once."""
        cursor: Any = "0-0"
        while True:
            (reply,) = await self._wire.ask(
                [("XAUTOCLAIM", self._name, GROUP, self._consumer, 0, cursor, "COUNT", BATCH, "JUSTID")]
            )
            cursor = checked(reply)[0]
            if cursor in (b"0-0", "0-0"):
                return

    async def read(self, start: str, count: int) -> Found:
        """Return entries after `start` that are ours, or with ">" such as nobody was given. Does not wait."""
        command = [GROUP, self._consumer, start, count, BATCH_BYTES]
        time, missed, entries, is_all = await run_script(
            lambda whole: self._wire.ask([_READ.command([self._name, self._missed], command, whole=whole)])
        )
        now_ms, is_known = _ms(time), start == ">" and is_all and not missed
        return Found(now_ms, _entries(entries), now_ms if is_known else None)

    async def wait(self, before: Found) -> Found:
        """Wait for an entry, for `BLOCK_MS` at the most. `before`: what was read last."""
        command = ("GROUP", GROUP, self._consumer, "COUNT", 1, "BLOCK", BLOCK_MS, "STREAMS", self._name, ">")
        reply, time = await self._wire.ask([("XREADGROUP", *command), ("TIME",)])
        if not checked(reply):
            return before
        # RESP3 has a map of streams where RESP2 has pairs.
        streams = list(reply.values()) if isinstance(reply, Mapping) else [found for _, found in reply]
        return Found(_ms(checked(time)), _entries(streams[0]), before.all_until)

    async def put_aside(self, poison: Sequence[tuple[Entry, str]]) -> None:
        """Keep entries that can never be applied, each with the reason."""
        commands = [
            ("XADD", self._aside, "MAXLEN", "~", ASIDE, "*", "id", entry.id, "reason", reason, *_flat(entry))
            for entry, reason in poison
        ]
        for reply in await self._wire.ask(commands):
            checked(reply)

    async def acknowledge(self, ids: Sequence[str]) -> None:
        """Take entries out that have been applied, and with them what is older, of which somebody died just here."""
        done = [("XACK", self._name, GROUP, *ids), ("XTRIM", self._name, "MINID", _next(ids[-1]))]
        for reply in await self._wire.ask(done):
            checked(reply)


def _ms(time: Sequence[Any]) -> int:
    return int(time[0]) * 1000 + int(time[1]) // 1000


def _flat(entry: Entry) -> list[bytes]:
    return [item for pair in entry.fields.items() for item in pair]


def _next(entry_id: str) -> str:
    ms, _, sequence = entry_id.partition("-")
    return f"{ms}-{int(sequence) + 1}"


def _entries(found: Sequence[Any]) -> list[Entry]:
    """Return the entries in a reply. One that was deleted meanwhile has no fields."""
    if found and isinstance(found[0], list) and found[0] and isinstance(found[0][0], list):
        found = found[0]
    return [Entry(entry[0].decode(), _pairs(entry[1:])) for entry in found]


def _pairs(rest: Sequence[Any]) -> Mapping[bytes, bytes]:
    """Return an entry's fields, a map in RESP3. Where there are none, a script's reply ends with the id."""
    fields = rest[0] if rest else None
    if isinstance(fields, Mapping):
        return fields
    flat = fields or []
    return dict(zip(flat[::2], flat[1::2], strict=True))


def checked(reply: Any) -> Any:
    """Return a reply, or raise the error that it is."""
    if isinstance(reply, Exception):
        raise reply
    return reply
