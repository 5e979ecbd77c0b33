"""`fsm_list`, `fsm_show`, `fsm_set` and `fsm_clear`: find a conversation, understand it, mend it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from aiogram.fsm.storage.base import StorageKey
from django.db.models import F

from fsm_storage import DjangoStorage
from fsm_storage.models import FSMRecord
from tests.commands.conftest import Run
from tests.rows import let_time_pass, record, records, transitions

Make = Callable[..., DjangoStorage]
FIRST, SECOND, THIRD = StorageKey(1, 7, 7), StorageKey(1, -100, 8, thread_id=5), StorageKey(2, 9, 9)


def write(storage: DjangoStorage, key: StorageKey, state: str | None, data: dict[str, Any]) -> None:
    async def main() -> None:
        await storage.set_state(key, state)
        await storage.set_data(key, data)

    asyncio.run(main())


@pytest.fixture
def three(storage: DjangoStorage, database: str) -> str:
    """Three conversations, the first changed longest ago; the alias of their storage and database."""
    write(storage, FIRST, "Order:item", {"name": "Ann Lee", "cart": {"n": 1}})
    write(storage, SECOND, "Order.Gift:note", {"cart": {"n": 2}})
    write(storage, THIRD, None, {"paid": True})
    rows = FSMRecord.objects.using(database)
    for days, chat in ((3, 7), (2, -100), (1, 9)):
        rows.filter(chat_id=chat).update(updated_at=F("updated_at") - timedelta(days=days))
    return database


def chats(run: Run, *arguments: Any) -> list[int]:
    said = run("fsm_list", "--json", *arguments)
    assert said.code == 0, said.err
    return [line["chat_id"] for line in said.lines]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], [9, -100, 7]),
        (["--limit", 2], [9, -100]),
        (["--limit", 0], [9, -100, 7]),
        (["--bot", 1], [-100, 7]),
        (["--chat", -100], [-100]),
        (["--user", 8, "--thread", 5], [-100]),
        (["--state", "Order:item"], [7]),
        (["--state", "Order:item", "--no-state"], [9, 7]),
        (["--group", "Order"], [-100, 7]),
        (["--group", "Order.Gift"], [-100]),
        (["--group", "order"], []),
        (["--idle", "36h"], [-100, 7]),
        (["--data", "cart.n=2"], [-100]),
        (["--data", "name=Ann Lee"], [7]),
        (["--data", "paid=true"], [9]),
        (["--data", "cart.n=1", "--state", "nothing"], []),
        (["--destiny", "wizard"], []),
    ],
)
def test_the_list_and_its_filters(filters: list[Any], expected: list[int], three: str, run: Run) -> None:
    assert chats(run, "--alias", three, *filters) == expected


def test_the_list_by_expiry(make_storage: Make, database: str, run: Run) -> None:
    write(make_storage(state_ttl=600, data_ttl=600), FIRST, "a", {"n": 1})
    write(make_storage(), SECOND, "a", {})
    place = ("--database", database)
    assert chats(run, *place, "--expiring", "1h") == [7]
    assert chats(run, *place, "--expiring", "1m") == []
    let_time_pass(database, 3600)
    assert chats(run, *place, "--expired") == [7]
    assert chats(run, *place, "--state", "a") == [-100]


def test_the_list_as_a_table_obeys_nothing_in_it(storage: DjangoStorage, database: str, run: Run) -> None:
    write(storage, FIRST, "Order:\x1b[31mitem\n", {"x": "\x9b31m" + "y" * 500})
    write(storage, SECOND, "", {})
    said = run("fsm_list", "--alias", database)
    header, first, second = said.out.splitlines()
    assert header.split() == ["KEY", "STATE", "CHAT", "USER", "CHANGED", "EXPIRES", "DATA"]
    assert first.split()[:2] == ["1:-100:8:5", '""']
    assert second.split()[:4] == ["1:7:7", r"Order:\x1b[31mitem\n", "7", "7"]
    assert not {"\x1b", "\x9b"} & set(said.out)
    assert len(second) < 250
    assert "only the first 1; --limit 0 shows all" in run("fsm_list", "--alias", database, "--limit", 1).err
    assert run("fsm_list", "--alias", database, "--chat", 5).out == "no conversation fits\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--idle", "soon"], "is no duration"),
        (["--chat", "x"], "invalid"),
        (["--chat", str(2**63)], "does not fit 64 bits"),
        (["--data", "nothing"], "neither an id nor key=value"),
        (["--limit", "-1"], "must be 0 or more"),
        (["--database", "nowhere"], "'nowhere' is not in DATABASES; it has default"),
        (["--limit", "many"], "invalid int value"),
        (["--alias", "defualt"], "FSM_STORAGES has no 'defualt', and no record either; it has 'default'"),
    ],
)
@pytest.mark.django_db
def test_arguments_that_mean_nothing(arguments: list[str], reason: str, run: Run) -> None:
    said = run("fsm_list", *arguments)
    assert said.code in (1, 2)
    assert reason in said.err


def test_show_by_key_and_by_parts(three: str, run: Run) -> None:
    by_key = run("fsm_show", "1:7:7", "--alias", three)
    assert by_key.code == 0
    assert by_key.out == run("fsm_show", "--chat", 7, "--alias", three).out
    shown = dict(line.split(":", 1) for line in by_key.out.splitlines()[:9])
    assert (shown["key"].strip(), shown["state"].strip()) == ("1:7:7", "Order:item")
    assert '"name": "Ann Lee"' in by_key.out
    assert by_key.out.splitlines()[-1].split()[2:] == ["-", "Order:item", "bot", "-"]


def test_show_as_json_is_what_import_reads(three: str, run: Run) -> None:
    conversation, *history = run("fsm_show", "1:7:7", "--alias", three, "--json").lines
    assert (conversation["type"], conversation["state"]) == ("conversation", "Order:item")
    assert [(line["type"], line["from_state"], line["to_state"]) for line in history] == [
        ("transition", None, "Order:item")
    ]


def test_show_says_when_nothing_or_too_much_fits(three: str, run: Run) -> None:
    said = run("fsm_show", "1:1:1", "--alias", three)
    assert (said.code, "there is no conversation with key='1:1:1'" in said.err) == (4, True)
    said = run("fsm_show", "--bot", 1, "--alias", three)
    assert said.code == 2
    assert "more than one conversation fits" in said.err
    assert f"1:7:7 --alias {three}" in said.err
    assert run("fsm_show", "--alias", three).code == 2


def test_set_is_what_the_bot_sees_next(three: str, storage: DjangoStorage, run: Run) -> None:
    said = run(
        "fsm_set", "1:7:7", "--alias", three, "--state", "Order:size", "--data", '{"m": 2}', "--by", "maria"
    )
    assert said.code == 0
    assert f"1:7:7 is at version {record(three, chat_id=7).version} now" in said.out
    assert asyncio.run(storage.get_state(FIRST)) == "Order:size"
    assert asyncio.run(storage.get_data(FIRST)) == {"m": 2}
    assert transitions(three, chat_id=7)[-1] == ("Order:item", "Order:size", "admin", "maria")


def test_set_warns_of_a_state_that_nobody_declares(three: str, run: Run) -> None:
    said = run("fsm_set", "1:7:7", "--alias", three, "--state", "Order:siez")
    assert said.code == 0
    assert "no app declares the state 'Order:siez'" in said.err


def test_set_takes_a_state_away_and_sets_expiries(three: str, run: Run) -> None:
    run("fsm_set", "1:7:7", "--alias", three, "--no-state", "--data-ttl", "2h", "--json")
    row = record(three, chat_id=7)
    now = FSMRecord.objects.using(three).clock()
    assert row.state is None
    assert timedelta(minutes=119) < row.data_expires_at - now <= timedelta(hours=2)
    said = run("fsm_set", "1:7:7", "--alias", three, "--data-ttl", "never", "--json")
    assert said.json["data_expires_at"] is None


def test_set_at_another_version_has_an_exit_code_of_its_own(three: str, run: Run) -> None:
    version = record(three, chat_id=7).version
    arguments = ("fsm_set", "--chat", 7, "--alias", three, "--state", "x")
    said = run(*arguments, "--if-version", version - 1)
    assert said.code == 5
    assert f"expected version {version - 1}, it is at version {version}" in said.err
    assert record(three, chat_id=7).state == "Order:item"
    assert run(*arguments, "--if-version", version).code == 0


def test_set_makes_a_conversation_only_if_asked_to(storage: DjangoStorage, database: str, run: Run) -> None:
    arguments = ("fsm_set", "--bot", 1, "--chat", -100, "--user", 8, "--thread", 5, "--alias", database)
    assert run(*arguments, "--state", "a").code == 4
    assert records(database) == []
    said = run(*arguments, "--state", "a", "--create", "--json")
    assert (said.code, said.json["key"], said.json["destiny"]) == (0, "1:-100:8:5", "default")
    assert asyncio.run(storage.get_state(SECOND)) == "a"
    said = run(*arguments, "--no-state", "--create")  # it is there now
    assert (said.code, record(database).state) == (0, None)
    said = run("fsm_set", "--chat", 4, "--alias", database, "--state", "a", "--create")
    assert (said.code, "--create needs --bot, --user" in said.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "say what to change"),
        (["--data", "{"], "Expecting"),
        (["--data", "[1]"], "not a list"),
        (["--state", "a", "--no-state"], "not allowed with"),
        (["--state-ttl", "soon"], "is no duration"),
        (["--data", '{"x": NaN}'], "x is nan"),
        (["--state", "s" * 300], "has 300 characters"),
    ],
)
def test_set_refuses_what_cannot_be_set(arguments: list[str], reason: str, three: str, run: Run) -> None:
    before = record(three, chat_id=7).version
    said = run("fsm_set", "1:7:7", "--alias", three, *arguments)
    assert said.code in (1, 2)
    assert reason in said.err
    assert record(three, chat_id=7).version == before


def test_clear_by_key_and_by_filter(three: str, storage: DjangoStorage, run: Run) -> None:
    said = run("fsm_clear", "1:7:7", "--alias", three, "--no-input")
    assert (said.code, said.out) == (0, "cleared 1 conversation\n")
    assert asyncio.run(storage.get_data(FIRST)) == {}
    said = run("fsm_clear", "--group", "Order", "--alias", three, "--no-input", "--json", "--keep-data")
    assert said.json == {"cleared": 1}
    row = record(three, chat_id=-100)
    assert (row.state, row.data) == (None, {"cart": {"n": 2}})
    assert run("fsm_clear", "--all", "--alias", three, "--no-input", "--json").json == {"cleared": 2}
    assert run("fsm_clear", "--all", "--alias", three, "--no-input", "--json").json == {"cleared": 0}


def test_clear_asks_and_a_dry_run_only_counts(three: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return answers.pop()

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    answers = ["y", "no", ""]
    for _ in range(2):
        said = run("fsm_clear", "--bot", 1, "--alias", three)
        assert (said.code, said.err) == (1, "nothing was changed\n")
    assert asked == ["Clear 2 conversations? [y/N] "] * 2
    assert FSMRecord.objects.using(three).live().count() == 3
    said = run("fsm_clear", "--bot", 1, "--alias", three, "--dry-run", "--json")
    assert (said.json, len(asked)) == ({"would_clear": 2}, 2)
    assert run("fsm_clear", "--bot", 1, "--alias", three).code == 0
    assert FSMRecord.objects.using(three).live().count() == 1


def test_clear_needs_a_terminal_or_a_yes_and_something_to_clear(
    three: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert run("fsm_clear", "--bot", 1, "--alias", three).code == 2
    assert run("fsm_clear", "--alias", three).code == 2
    assert run("fsm_clear", "1:1:1", "--alias", three, "--no-input").code == 4
    assert FSMRecord.objects.using(three).live().count() == 3


def test_clear_leaves_alone_who_moved_on_meanwhile(
    three: str, storage: DjangoStorage, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(question: str) -> str:
        asyncio.run(storage.set_state(FIRST, "Support:topic"))
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert run("fsm_clear", "--group", "Order", "--alias", three, "--json").json == {"cleared": 1}
    assert record(three, chat_id=7).state == "Support:topic"


def test_records_of_another_database_are_shown_and_not_changed(
    make_storage: Make, database: str, run: Run, settings: Any
) -> None:
    write(make_storage(alias="one"), FIRST, "a", {})
    elsewhere = {"BACKEND": "fsm_storage.DjangoStorage", "OPTIONS": {"database": "elsewhere"}}
    settings.FSM_STORAGES = {**settings.FSM_STORAGES, "one": elsewhere}
    assert run("fsm_show", "1:7:7", "--database", database).code == 0
    for command in (("fsm_set", "1:7:7", "--state", "b"), ("fsm_clear", "1:7:7", "--no-input")):
        said = run(*command, "--database", database)
        assert said.code == 1
        assert "storage 'one' is in database 'elsewhere'" in said.err
    assert record(database).state == "a"


def test_a_key_of_two_storages_must_be_named_with_its_alias(
    make_storage: Make, database: str, run: Run
) -> None:
    for alias in ("one", "two"):
        write(make_storage(alias=alias), FIRST, alias, {})
    assert run("fsm_show", "1:7:7", "--database", database).code == 2
    said = run("fsm_show", "1:7:7", "--database", database, "--alias", "two", "--json")
    assert json.loads(said.out.splitlines()[0])["state"] == "two"
