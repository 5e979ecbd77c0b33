"""Leases in Redis: each is a key with a time limit, whose value is `token owner`. Knows no storage."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import RedisError, ResponseError

from fsm_storage.backends.wire import Wire, is_passing, run_script, wire_for
from fsm_storage.backends.writing import BATCH_SIZE, Command, Script
from fsm_storage.batching import Batcher
from fsm_storage.dialects import Claim
from fsm_storage.exceptions import RedisUnavailable

LOCK: Final = "lock"
"""The part of the key, which is that of aiogram's `RedisEventIsolation`: they keep each other out."""
_TOKENS: Final = "fsm_storage:lease_token"
LOOK_SECONDS: Final = 0.3
"""For which a page that only mentions a lease waits for Redis."""

# KEYS: that of the last token, unless it is a Cluster, where it would be on another node; then the key of
# each claim. ARGV: how many keys come before the claims'; then of each claim the owner, the milliseconds
# and the token. The reply for each: the token, nil if nothing was done, or the error.
#
# The token is Redis's time in microseconds, so that it also grows when Redis lost all that it had, and
# above the last one, so that it also grows when the clock is set back. Each `SET` may fail alone (out of
# memory); renewing and giving back need no memory.
_CLAIM: Final = Script("""\
local before = tonumber(ARGV[1])
local replies, last = {}, nil
local function new_token()
  if not last then
    local time = redis.call('TIME')
    last = time[1] * 1000000 + time[2]
    local known = before == 1 and tonumber(redis.call('GET', KEYS[1]) or '0') or 0
    if known >= last then last = known + 1 end
  else
    last = last + 1
  end
  return string.format('%.0f', last)
end
for i = before + 1, #KEYS do
  local key, at = KEYS[i], 2 + (i - before - 1) * 3
  local owner, ms, token = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local found, reply, is_own = redis.pcall('GET', key), false, false
  if type(found) == 'string' then
    if token == '' then is_own = string.sub(found, -#owner - 1) == ' ' .. owner
    else is_own = string.sub(found, 1, #token + 1) == token .. ' ' end
  end
  if type(found) == 'table' then
    reply = found
  elseif token == '' and ms ~= '0' then
    if not found or is_own then
      reply = new_token()
      local done = redis.pcall('SET', key, reply .. ' ' .. owner, 'PX', ms)
      if done.err then reply = done end
    end
  elseif is_own then
    reply = string.match(found, '^%d+')
    if ms == '0' then redis.call('DEL', key) else redis.call('PEXPIRE', key, ms) end
  end
  replies[i - before] = reply
end
if last and before == 1 then redis.pcall('SET', KEYS[1], string.format('%.0f', last)) end
return replies
""")


class Claims:
    """Carries out the claims of all event loops of the process, in a thread with a connection of its own.

    So their order is one, and a lease is given back also when the event loop ends in which that was asked for.
    """

    def __init__(self, redis: Redis | RedisCluster, alias: str, timeout: float, max_pending: int) -> None:
        self._redis, self._alias = redis, alias
        self._own = threading.local()  # the thread of a fork has nothing of its parent's
        self.batcher: Batcher[Claim, Any] = Batcher(
            self._commit, key=lambda _: None, release=self._release, name=f"fsm_storage {alias} leases",
            timeout=timeout, max_pending=max_pending, batch_size=BATCH_SIZE, server=f"Redis of {alias!r}",
        )  # fmt: skip

    def _commit(self, claims: Sequence[Claim], deadline: float) -> Sequence[Any]:
        if not hasattr(self._own, "runner"):
            self._own.runner, self._own.wire = asyncio.Runner(), wire_for(self._redis)
        runner: asyncio.Runner = self._own.runner
        return runner.run(self._answers(self._own.wire, claims, deadline))

    async def _answers(self, wire: Wire, claims: Sequence[Claim], deadline: float) -> Sequence[Any]:
        """Ask while Redis is away for a passing reason, until a little before `deadline`: then its error is told."""
        failures, now = 0, time.monotonic()
        deadline = now + (deadline - now) * 0.98
        while True:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    return await carry_out(wire, claims, self._alias)
            except Exception as error:
                await wire.hang_up()
                pause = min(0.01 * 2**failures, 0.5) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
                if not is_passing(error) or time.monotonic() + pause >= deadline:
                    return [RedisUnavailable(self._alias, error) for _ in claims]
                await asyncio.sleep(pause if failures else 0.0)
                failures += 1

    def _release(self) -> None:
        if hasattr(self._own, "runner"):
            self._own.runner.run(self._own.wire.hang_up())
            self._own.runner.close()


async def is_held(wire: Wire, name: str) -> bool:
    """Say whether there is a lease. False if Redis does not say so within `LOOK_SECONDS`."""
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            (found,) = await wire.ask([("EXISTS", name)])
    except (RedisError, OSError, TimeoutError):
        return False
    finally:
        await wire.hang_up()
    return bool(found == 1)


async def carry_out(wire: Wire, claims: Sequence[Claim], alias: str) -> list[Any]:
    """Return the reply to each claim: see `Claim`. Raises what the whole batch should be sent again for."""
    replies: list[Any] = []
    if wire.one_key:
        answers = await wire.ask([_command([claim], (), whole=True) for claim in claims])
        replies += [answer if isinstance(answer, Exception) else answer[0] for answer in answers]
    else:
        for first in range(0, len(claims), BATCH_SIZE):
            replies += await _run(wire, claims[first : first + BATCH_SIZE])
    return [_answer(claim, reply, alias) for claim, reply in zip(claims, replies, strict=True)]


async def _run(wire: Wire, claims: Sequence[Claim]) -> list[Any]:
    return await run_script(lambda whole: wire.ask([_command(claims, (_TOKENS,), whole=whole)]))


def _command(claims: Sequence[Claim], before: Sequence[str], *, whole: bool) -> Command:
    arguments: list[Any] = [len(before)]
    for claim in claims:
        token = "" if claim.token is None else claim.token
        ms = max(1, round(claim.seconds * 1000)) if claim.seconds else 0
        arguments += (claim.owner, ms, token)
    return _CLAIM.command([*before, *(claim.key for claim in claims)], arguments, whole=whole)


def _answer(claim: Claim, reply: Any, alias: str) -> Any:
    if isinstance(reply, Exception):
        if is_passing(reply):
            raise reply
        return RedisUnavailable(alias, ResponseError(f"{reply} ({claim.key!r})"))
    return None if reply is None else int(reply)
