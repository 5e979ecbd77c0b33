"""Every address of the app in the admin, found by walking the project's URLs."""

from django.urls import URLPattern, get_resolver

from fsm_storage.models import FSMBulk, FSMTransition

SECRET = "+7-999-SECRET"


def urls_of(record):
    """Every address of the app in the admin, with this record's numbers filled in."""
    step = FSMTransition.objects.of(record).first()
    found = []
    for name in _names(get_resolver(), []):
        pk = step.pk if "fsmtransition" in name else record.pk
        number = name.replace("<path:object_id>", str(pk)).replace("<int:bulk_id>", str(_bulk_of(record)))
        found.append(f"/{number}")
    return found


def _bulk_of(record):
    bulk, _made = FSMBulk.objects.get_or_create(action="clear_state", actor="x")
    bulk.items.get_or_create(
        record_id=record.pk, key=record.key, outcome="changed", before={"data": {"phone": SECRET}}
    )
    return bulk.pk


def _names(resolver, prefix):
    for pattern in resolver.url_patterns:
        route = [*prefix, str(pattern.pattern)]
        if isinstance(pattern, URLPattern):
            if "fsm_storage" in "".join(route) and "(?P" not in "".join(route):
                yield "".join(route)
        else:
            yield from _names(pattern, route)
