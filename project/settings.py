"""Settings of the example project: SQLite, one bot, the admin. Copy what you need."""

import os
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fsm_storage import DefaultKeyBuilder

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = os.environ.get("SECRET_KEY", "only-for-the-demo")
DEBUG = os.environ.get("DEBUG", "1") == "1"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "fsm_storage",
    "project",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "project.urls"
ASGI_APPLICATION = "project.asgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

# What SQLite needs so that a bot and a web process can share one file: readers that
# do not wait for the writer (WAL), transactions that take the write lock when they
# begin instead of failing half-way, and patience while the other one writes.
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("SQLITE_PATH", BASE_DIR / "demo.sqlite3"),
        "OPTIONS": {
            "timeout": 5,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
        },
    },
}

FSM_STORAGES: dict[str, dict[str, Any]] = {
    "default": {
        "BACKEND": "fsm_storage.DjangoStorage",
        "OPTIONS": {
            "state_ttl": timedelta(days=2),
            "data_ttl": timedelta(days=2),
            "expiry": "project.handlers.reminders.expiry",
        },
    },
}

# How open pages of the admin learn of changes. In memory, a process tells only itself: pages also ask now and then.
CHANNEL_LAYERS: dict[str, dict[str, Any]] = {}
if find_spec("channels"):
    CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}

# With REDIS_URL the conversations are in Redis, and mirrored into the database.
if REDIS_URL := os.environ.get("REDIS_URL"):
    FSM_STORAGES = {
        "default": {
            "BACKEND": "fsm_storage.RedisStorage",
            "OPTIONS": {
                "url": REDIS_URL,
                "state_ttl": timedelta(days=2),
                "data_ttl": timedelta(days=2),
                "key_builder": DefaultKeyBuilder(
                    with_bot_id=True, with_business_connection_id=True, with_destiny=True
                ),
            },
        },
    }
    if find_spec("channels_redis"):
        CHANNEL_LAYERS = {
            "default": {
                "BACKEND": "channels_redis.core.RedisChannelLayer",
                "CONFIG": {"hosts": [REDIS_URL]},
            },
        }

DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
STATIC_URL = "static/"
LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
