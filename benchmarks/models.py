"""The table of the plain Django-ORM peer. The benchmarks make it with `migrate --run-syncdb`."""

from django.db import models


class PlainState(models.Model):
    """What a bot's author writes first."""

    key = models.CharField(max_length=255, unique=True)
    state = models.CharField(max_length=255, null=True)  # noqa: DJ001 - None is no state
    data = models.JSONField(default=dict)

    def __str__(self) -> str:
        return self.key
