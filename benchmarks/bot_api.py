"""What the bot of the answering Dispatcher talks to: it takes any message, in as little time as may be."""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web

_SENT = {
    "ok": True,
    "result": {
        "message_id": 1,
        "date": 1_760_000_000,
        "chat": {"id": 1, "type": "private"},
        "text": "Noted.",
    },
}
_BODY = json.dumps(_SENT).encode()


async def _answer(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(body=_BODY, content_type="application/json")


async def serve() -> None:
    """Serve on a free port of the loopback, which is said on standard output, until SIGTERM."""
    app = web.Application()
    app.router.add_post("/{path:.*}", _answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
