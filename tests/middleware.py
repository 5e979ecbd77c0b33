"""What the tests put around the pages: a strict Content-Security-Policy, and a memory that tests can clear."""

from collections.abc import Callable
from typing import Any

from django.contrib.contenttypes.models import ContentType

CSP = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"


def strict_csp(get_response: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Middleware: allow what comes from this host in files of its own, and nothing else."""

    def middleware(request: Any) -> Any:
        response = get_response(request)
        response["Content-Security-Policy"] = CSP
        return response

    return middleware


def forgetful(get_response: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Middleware for a process that outlives tests: after each of them, content types have new numbers."""

    def middleware(request: Any) -> Any:
        ContentType.objects.clear_cache()
        return get_response(request)

    return middleware
