"""`python -m benchmarks.mirroring`: a bot writes to Redis at a set rate; does a mirror in another process keep up?"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time

from aiogram.fsm.storage.base import StorageKey

from benchmarks.cells import prepare_django
from benchmarks.contenders import Places
from benchmarks.runner import Runner, places

CHATS = 512


async def write(storage: object, rate: int, seconds: float) -> int:
    """Write states and data in turn, `rate` a second of all chats together; return how many."""
    done, end = 0, time.perf_counter() + seconds

    async def talk(chat: int) -> None:
        nonlocal done
        key, n = StorageKey(bot_id=42, chat_id=chat, user_id=chat), 0
        started, pause = time.perf_counter(), 2 * CHATS / rate
        while time.perf_counter() < end:
            n += 1
            await storage.set_state(key, f"Order:{n % 5}")  # type: ignore[attr-defined]
            await storage.update_data(key, {"step": n, f"choice{n % 3}": f"item {n}"})  # type: ignore[attr-defined]
            done += 2
            await asyncio.sleep(max(0.0, started + n * pause - time.perf_counter()))

    await asyncio.gather(*(talk(chat) for chat in range(1, CHATS + 1)))
    return done


async def measure(where: Places, database: str, rate: int, seconds: float) -> None:
    from fsm_storage import RedisStorage
    from fsm_storage.mirror import repairing

    storage = RedisStorage.from_url(where.redis, database=database, mirror="apart")
    command = [sys.executable, "-m", "benchmarks.mirroring", "--mirror", where.redis, database]
    mirror = subprocess.Popen(command)
    try:
        while not (await repairing.status(storage)).mirrors:  # it has to import Django first
            await asyncio.sleep(0.1)
        writing = asyncio.create_task(write(storage, rate, seconds))
        began, lags = time.perf_counter(), []
        while not writing.done():
            await asyncio.sleep(1)
            lags.append((await repairing.status(storage)).lag_seconds)
        done, took = await writing, time.perf_counter() - began
        caught_up = time.perf_counter()
        while (await repairing.status(storage)).entries:
            await asyncio.sleep(0.01)
        third = max(1, len(lags) // 3)
        print(
            f"{database}: {done / took:,.0f} writes/s for {took:.0f} s; lag at most {max(lags[:third]):.2f} s in the "
            f"first third, {max(lags[-third:]):.2f} s in the last; "
            f"caught up {time.perf_counter() - caught_up:.2f} s after the last write"
        )
        found = await repairing.compare(storage)
        print(f"{database}: {found.same} conversations are the same, {found.total} differ")
    finally:
        mirror.terminate()
        mirror.wait(20)
        await storage.close()


async def mirror(url: str, database: str) -> None:
    import signal

    from fsm_storage import RedisStorage
    from fsm_storage.mirror.worker import Mirror

    mirror = Mirror(RedisStorage.from_url(url, database=database, mirror="apart"))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, mirror.stop)
    began = time.process_time()
    writes = (await mirror.run()).writes
    spent = (time.process_time() - began) / max(1, writes)
    print(f"{database}: the mirror took {spent * 1e6:.1f} µs of processor time for each of {writes:,} writes")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mirroring", description=__doc__)
    parser.add_argument("--rate", type=int, default=10_000, help="writes a second (10,000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, for each database (60)")
    parser.add_argument("--mirror", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mirror:
        import django

        django.setup()
        asyncio.run(mirror(*options.mirror))
        return
    with places() as where:
        runner = Runner(where)
        runner.migrate()
        prepare_django(where)
        for database, contender in (("default", "ours-sqlite-states"), ("postgres", "ours-postgres-states")):
            runner.clean("redis")
            runner.clean(contender)
            asyncio.run(measure(where, database, options.rate, options.seconds))


if __name__ == "__main__":
    main()
