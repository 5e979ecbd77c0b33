"""The settings of the tests in a project that uses django-unfold."""

from tests import settings

globals().update({name: value for name, value in vars(settings).items() if name.isupper()})

INSTALLED_APPS = ["unfold", *settings.INSTALLED_APPS]
TEMPLATES = [{**settings.TEMPLATES[0], "DIRS": []}]  # the example project's own are made for Django's admin
# Unfold's own scripts and styles are inline, so there is no policy here.
MIDDLEWARE = [
    "tests.middleware.forgetful",
    *(name for name in settings.MIDDLEWARE if name != "tests.middleware.strict_csp"),
]
