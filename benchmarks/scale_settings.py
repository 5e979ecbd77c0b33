"""The example project's settings on the PostgreSQL of `benchmarks.scale`."""

import os

from project.settings import *  # noqa: F403

DEBUG = False
ALLOWED_HOSTS = ["*"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": os.environ["BENCH_POSTGRES"],
        "USER": "postgres",
        "NAME": "postgres",
        # Without helpers, all the processor time of a statement is that of one process.
        "OPTIONS": {"options": "-c max_parallel_workers_per_gather=0"},
    },
}
