"""Django's settings inside a benchmark's process; `cells.prepare_django` says where the databases are."""

import os

SECRET_KEY = "only-for-benchmarks"
INSTALLED_APPS = ["fsm_storage", "benchmarks"]
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

_SYNCHRONOUS = os.environ.get("BENCH_SYNCHRONOUS", "NORMAL")

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ["BENCH_SQLITE"],
        "OPTIONS": {
            "timeout": 5,
            "transaction_mode": "IMMEDIATE",
            "init_command": f"PRAGMA journal_mode=WAL; PRAGMA synchronous={_SYNCHRONOUS}",
        },
    },
    "postgres": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": os.environ["BENCH_POSTGRES"],
        "USER": "postgres",
        "NAME": "postgres",
    },
}
