"""The mirror beside a cell's bot: one in a process of its own, and what is asked of any."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from benchmarks.contenders import Places

if TYPE_CHECKING:
    from fsm_storage import RedisStorage


async def serve(places: Places) -> None:
    """Mirror what contenders write to Redis into SQLite, until SIGTERM, as `manage.py fsm_mirror` does."""
    from fsm_storage import RedisStorage
    from fsm_storage.mirror.worker import Mirror

    mirror = Mirror(RedisStorage.from_url(places.redis, mirror="apart"))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, mirror.stop)
    await mirror.run()


async def wait_for_mirror(storage: RedisStorage) -> None:
    """Return when a mirror has begun to read the outbox."""
    from fsm_storage.mirror import repairing

    while not (await repairing.status(storage)).mirrors:
        await asyncio.sleep(0.01)


async def seconds_behind(storage: RedisStorage) -> float:
    """Return how old the oldest write is that is not mirrored yet. Raises if nothing has been mirrored."""
    from fsm_storage.mirror import repairing
    from fsm_storage.models import FSMRecord

    state = await repairing.status(storage)
    if not await FSMRecord.objects.aexists():
        raise RuntimeError(f"the mirror has written nothing: {state}")
    return state.lag_seconds
