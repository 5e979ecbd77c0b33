"""Conversations as a file to download, streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.db.models import QuerySet
from django.http import HttpRequest, StreamingHttpResponse

from fsm_storage.models import FSMRecord
from fsm_storage.rights import mask_for
from fsm_storage.transfer.lines import conversation_lines


def export(request: HttpRequest, records: QuerySet[FSMRecord]) -> StreamingHttpResponse:
    """Return the records as lines of JSON, with the data as the user may see it."""
    mask = mask_for(request.user)
    lines = conversation_lines(records, look=mask.over if mask else None)
    return StreamingHttpResponse(
        _in_threads(lines) if isinstance(request, ASGIRequest) else lines,
        content_type="application/x-ndjson",
        headers={"Content-Disposition": 'attachment; filename="conversations.jsonl"'},
    )


def _next(lines: Iterator[str]) -> str | None:
    return next(lines, None)


async def _in_threads(lines: Iterator[str]) -> AsyncIterator[str]:
    while (line := await sync_to_async(_next)(lines)) is not None:
        yield line
