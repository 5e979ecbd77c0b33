"""A mirror in a process of its own: python -m tests.redis.mirrors URL DATABASE."""

from __future__ import annotations

import asyncio
import sys

import django

django.setup()

from fsm_storage import RedisStorage  # noqa: E402 - needs Django
from fsm_storage.mirror.worker import Mirror  # noqa: E402


async def main(url: str, database: str) -> None:
    storage = RedisStorage.from_url(url, mirror="apart", database=database, timeout=20)
    await Mirror(storage).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
