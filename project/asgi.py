import os
from importlib.util import find_spec

from django.conf import settings
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
application = get_asgi_application()
if settings.DEBUG:  # in production a web server or WhiteNoise serves the static files
    application = ASGIStaticFilesHandler(application)
if find_spec("channels"):  # without it, pages of the admin ask now and then whether something has changed
    from channels.routing import ProtocolTypeRouter, URLRouter

    from fsm_storage.live.routing import websocket_urlpatterns

    application = ProtocolTypeRouter({"http": application, "websocket": URLRouter(websocket_urlpatterns)})
