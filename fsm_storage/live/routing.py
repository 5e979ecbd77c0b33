"""Where the websocket is: to be put into a project's `asgi.py`."""

from typing import Any

from channels.security.websocket import AllowedHostsOriginValidator
from channels.sessions import SessionMiddlewareStack
from django.urls import path

from fsm_storage.live.consumer import LiveConsumer


def websocket() -> Any:
    """Return the websocket as an ASGI application, which refuses pages of other hosts than `ALLOWED_HOSTS`."""
    return AllowedHostsOriginValidator(SessionMiddlewareStack(LiveConsumer.as_asgi()))


websocket_urlpatterns = [path("ws/fsm_storage/", websocket())]
