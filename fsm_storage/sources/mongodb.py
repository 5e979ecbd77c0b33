"""What aiogram's `PyMongoStorage` and `MongoStorage` keep in MongoDB: a document for each conversation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from fsm_storage.sources import broken
from fsm_storage.sources.layout import KeyLayout
from fsm_storage.transfer import Conversation, Found, Refused

DATABASE, COLLECTION = "aiogram_fsm", "states_and_data"
PATIENCE_MS = 10_000


def read(url: str, layout: KeyLayout, clock: Callable[[], datetime]) -> Iterator[Found]:
    """Yield the conversations of the database that the URL names, or of aiogram's own. None of them expires."""
    try:
        with MongoClient[dict[str, Any]](url, serverSelectionTimeoutMS=PATIENCE_MS) as client:
            collection = client.get_default_database(DATABASE)[COLLECTION]
            beginning = {"$regex": f"^{re.escape(layout.beginning)}"}
            for document in collection.find({"_id": beginning}).sort("_id"):
                yield found(document, layout)
    except PyMongoError as error:
        broken(url, error)


def found(document: Mapping[str, Any], layout: KeyLayout) -> Found:
    """Return what a document holds."""
    place = f"document {document['_id']!r}"
    try:
        key = layout.parse(document["_id"])
        state, data = document.get("state"), document.get("data") or {}
        if state is not None and not isinstance(state, str):
            raise TypeError(f"has a state of type {type(state).__name__} where text belongs")
        if not isinstance(data, dict):
            raise TypeError(f"has data of type {type(data).__name__} where an object belongs")
    except (ValueError, TypeError) as error:
        return Found(place, Refused(str(error)))
    return Found(place, Conversation(key, state, data))
