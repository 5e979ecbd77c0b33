"""The example project's settings on the PostgreSQL of `benchmarks.scale`."""

import os

from project.settings import *  # noqa: F403

DEBUG = False
ALLOWED_HOSTS = ["*"]
_SERVER = {
    "ENGINE": "django.db.backends.postgresql",
    "HOST": os.environ["BENCH_POSTGRES"],
    "USER": "postgres",
    # Without helpers, all the processor time of a statement is that of one process.
    "OPTIONS": {"options": "-c max_parallel_workers_per_gather=0"},
}
DATABASES = {
    "default": {**_SERVER, "NAME": "postgres"},
    # For operations on few and on many records in turns, on one server.
    "small": {**_SERVER, "NAME": "small"},
}
