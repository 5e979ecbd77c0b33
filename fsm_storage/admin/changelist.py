"""The list of conversations on tables of any size: nothing here counts or reads more than a few pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from django.contrib import messages
from django.contrib.admin.views.main import PAGE_VAR, ChangeList
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.functional import cached_property
from django.utils.translation import gettext as _

from fsm_storage.admin.presentation import with_names
from fsm_storage.admin.timelimit import TookTooLong, time_limit

COUNT_LIMIT = 1000
PAGES_AHEAD = 3
SEARCH_SECONDS = 3
"""For which a database may look for the conversations of a page. A value in the data has no index by itself."""
DEEPEST_PAGE = 10_000
"""Further back, filters lead to the place; a database counts its way to such a page row by row."""

if TYPE_CHECKING:
    _ChangeList = ChangeList
    _Paginator = Paginator[Any]
else:
    _ChangeList, _Paginator = ChangeList, Paginator


class AtLeast(int):
    """A count that was given up; it shows as "1,000+"."""

    def __str__(self) -> str:
        return f"{int(self) - 1:,}+"


class BoundedPaginator(_Paginator):
    """Counts no further than `COUNT_LIMIT` rows or a few pages beyond the one that is asked for."""

    def __init__(self, *args: Any, page_asked: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        page = min(max(page_asked, 1), DEEPEST_PAGE)
        self.bound = max(COUNT_LIMIT, (page + PAGES_AHEAD) * self.per_page)

    @cached_property
    def count(self) -> int:
        found = cast("QuerySet[Any]", self.object_list).order_by()[: self.bound + 1].count()
        return found if found <= self.bound else AtLeast(found)

    def get_elided_page_range(self, number: Any = 1, **kwargs: Any) -> Iterator[int | str]:
        """Name no last page where nobody has counted so far."""
        pages = super().get_elided_page_range(number, **kwargs)
        if not isinstance(self.count, AtLeast):
            return pages
        far = int(number) + PAGES_AHEAD
        near = [page for page in pages if not isinstance(page, int) or page <= far]
        return iter(near if not isinstance(near[-1], int) else [*near, str(self.ELLIPSIS)])


def page_asked(request: HttpRequest) -> int:
    """Return the number of the page in the request's address, 1 if it is none."""
    try:
        return int(request.GET.get(PAGE_VAR, 1))
    except ValueError:
        return 1


class BoundedChangeList(_ChangeList):
    """A list whose count may be given up; large columns stay in the database."""

    deferred: tuple[str, ...] = ()

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        self.result_list = self.result_list.defer(*self.deferred)

    @property
    def previous_page(self) -> str | None:
        return self._page(self.page_num - 1) if self.multi_page and self.page_num > 1 else None

    @property
    def next_page(self) -> str | None:
        is_last = self.page_num >= self.paginator.num_pages
        return self._page(self.page_num + 1) if self.multi_page and not is_last else None

    def _page(self, number: int) -> str:
        return str(self.get_query_string({PAGE_VAR: number}))


class RecordChangeList(BoundedChangeList):
    deferred = ("data",)
    was_stopped = False
    """Whether the database took too long, so that it is not known what there is."""

    def get_results(self, request: HttpRequest) -> None:
        """Find the conversations within `SEARCH_SECONDS`, and the names of their chats and users with one query."""
        try:
            with time_limit(self.queryset.db, SEARCH_SECONDS):
                super().get_results(request)
                with_names(self.result_list)
        except TookTooLong:
            self.was_stopped = True
            self.queryset = self.queryset.none()
            super().get_results(request)
            messages.error(request, _stopped(self.query))


def _stopped(query: str) -> str:
    """Say what was stopped, and what to do."""
    if "=" not in query:
        return _(
            "The database took more than %(seconds)d seconds, and was stopped: choose fewer filters."
        ) % {"seconds": SEARCH_SECONDS}
    return _(
        "The search took more than %(seconds)d seconds, and was stopped: for a value in the data, every conversation "
        "has to be read. Add a chat or user id or a name to it; or ask your developers for the index on the data."
    ) % {"seconds": SEARCH_SECONDS}


class TransitionChangeList(BoundedChangeList):
    deferred = ("data_before", "data_after")
