"""The example project's settings, on a SQLite file and real servers that live in a temporary folder.

A process that a test starts finds the same databases through `FSM_TEST_DIR` (see `tests.servers.child_env`).
"""

import os
import tempfile
from pathlib import Path

from project.settings import (
    DEFAULT_AUTO_FIELD,
    FSM_STORAGES,
    INSTALLED_APPS,
    LANGUAGE_CODE,
    MIDDLEWARE,
    ROOT_URLCONF,
    STATIC_URL,
    TEMPLATES,
    TIME_ZONE,
    USE_TZ,
)
from tests.servers import missing_for_mariadb

__all__ = [
    "DEFAULT_AUTO_FIELD", "INSTALLED_APPS", "LANGUAGE_CODE", "MIDDLEWARE", "ROOT_URLCONF",
    "STATIC_URL", "TEMPLATES", "TIME_ZONE", "USE_TZ",
]  # fmt: skip

IS_CHILD = "FSM_TEST_DIR" in os.environ
# Short, because a socket's path has 107 bytes at the most, and `conftest` removes it at the end.
TEST_DIR = Path(os.environ.get("FSM_TEST_DIR") or tempfile.mkdtemp(prefix="fsm"))

# Here, not in a fixture: the server that browsers are sent to reads it once, before any test's own settings.
MIDDLEWARE = ["tests.middleware.strict_csp", *MIDDLEWARE]

SECRET_KEY = "only-for-tests"
DEBUG = False
ALLOWED_HOSTS = ["*"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        # A file: a worker thread would see neither an in-memory database nor a transaction of the test.
        "NAME": str(TEST_DIR / ("test.sqlite3" if IS_CHILD else "unused.sqlite3")),
        "OPTIONS": {
            "timeout": 5,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
        },
        "TEST": {"NAME": str(TEST_DIR / "test.sqlite3")},
    },
    "postgres": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": os.environ.get("FSM_TEST_PG_HOST", str(TEST_DIR / "pg")),
        "USER": "postgres",
        "NAME": os.environ.get("FSM_TEST_PG_NAME", "test_fsm" if IS_CHILD else "postgres"),
        "TEST": {"NAME": "test_fsm", "DEPENDENCIES": []},
    },
}
DATABASES["postgres16"] = {
    **DATABASES["postgres"],
    "HOST": os.environ.get("FSM_TEST_PG16_HOST", str(TEST_DIR / "pg16")),
}
_MARIADB = os.environ.get("FSM_TEST_MARIADB_HOST", str(TEST_DIR / "mariadb" / "socket"))
# Django would look for the driver of a database that no test uses. In its checks, 6.1 asks the server of each
# that it knows, and a child may be started without this one.
if not missing_for_mariadb() and (Path(_MARIADB).exists() or not IS_CHILD):
    DATABASES["mariadb"] = {
        "ENGINE": "django.db.backends.mysql",
        "HOST": _MARIADB,
        "USER": "root",
        "NAME": "test_fsm",
        "TEST": {"NAME": "test_fsm", "DEPENDENCIES": []},
    }

FSM_STORAGES = {
    **FSM_STORAGES,
    **{
        alias: {"BACKEND": "fsm_storage.DjangoStorage", "OPTIONS": {"database": alias}}
        for alias in DATABASES
        if alias != "default"
    },
}

# For processes that sweep: what they leave to handlers, or call them for.
if "FSM_TEST_EXPIRY" in os.environ:
    for _storage in FSM_STORAGES.values():
        _storage.setdefault("OPTIONS", {})["expiry"] = os.environ["FSM_TEST_EXPIRY"]

if "FSM_TEST_LAYER" in os.environ:  # for processes that tell each other
    CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.core.RedisChannelLayer",
            "CONFIG": {"hosts": [os.environ["FSM_TEST_LAYER"]]},
        },
    }
