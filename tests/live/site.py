"""The example project for `uvicorn`: with static files, and in a process that outlives tests."""

from django.conf import settings
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler

settings.MIDDLEWARE = ["tests.middleware.forgetful", *settings.MIDDLEWARE]

from project.asgi import application  # noqa: E402 - it loads the middleware

handlers = application.application_mapping
handlers["http"] = ASGIStaticFilesHandler(handlers["http"])
