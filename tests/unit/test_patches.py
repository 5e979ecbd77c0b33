"""The laws of patches. The oracle applies them one after another, on plain dicts."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm_storage.codec import Codec
from fsm_storage.patches import EMPTY, KEEP, MAX_TTL, NEVER, Content, Patch, Ttl, apply, ttl_seconds

NOW = 1_000_000.0
CODEC = Codec()


def fold(base: str, over: tuple[str, ...]) -> str:
    return CODEC.fold("key", base, over)[0]


def text(value: dict) -> str:
    return CODEC.encode(value, "key")


objects = st.dictionaries(st.sampled_from("abcd"), st.integers(-3, 3) | st.none(), max_size=3)
states = st.none() | st.sampled_from(["Form:name", "Form:age", ""])
patches = st.builds(
    Patch,
    st.just(KEEP) | states,
    st.just(KEEP) | objects.map(text),
    st.lists(objects.map(text), max_size=2).map(tuple),
)
ttls = st.builds(Ttl, st.none() | st.floats(0.1, 100), keep=st.booleans(), renew=st.booleans())
expiries = st.none() | st.floats(NOW - 10, NOW + 10)
contents = st.builds(Content, states, objects.map(text), expiries, expiries)


def slowly(patch: Patch, state: str | None, data: dict) -> tuple[str | None, dict]:
    """Do what a patch says, the obvious way."""
    if patch.state is not KEEP:
        state = patch.state
    if patch.data is not KEEP:
        data = json.loads(patch.data)
    for layer in patch.merge:
        data = {**data, **json.loads(layer)}
    return state, data


@given(patches, patches, states, objects)
def test_then_acts_like_one_patch_after_the_other(first, second, state, data):
    assert slowly(first.then(second), state, data) == slowly(second, *slowly(first, state, data))


@given(patches, patches, patches)
def test_then_is_associative(a, b, c):
    assert a.then(b).then(c) == a.then(b.then(c))


@given(patches)
def test_the_empty_patch_is_neutral(patch):
    assert patch.then(Patch()) == patch == Patch().then(patch)


@given(patches, states, objects)
def test_apply_does_what_the_patch_says(patch, state, data):
    new = apply(patch, Content(state, text(data)), NOW, fold=fold)
    assert (new.state, json.loads(new.data)) == slowly(patch, state, data)


@given(patches, contents, ttls, ttls)
def test_expired_parts_count_as_empty(patch, old, state_ttl, data_ttl):
    new = apply(patch, old, NOW, fold=fold, state_ttl=state_ttl, data_ttl=data_ttl)
    expected = slowly(patch, old.live_state(NOW), json.loads(old.live_data(NOW)))
    assert (new.live_state(NOW), json.loads(new.live_data(NOW))) == expected


@given(contents)
def test_a_part_that_is_not_touched_stays_as_it_is(old):
    new = apply(Patch(state="x"), old, NOW, fold=fold, state_ttl=NEVER)
    assert new.data == old.data
    if old.data != EMPTY:
        assert new.data_expires_at == old.data_expires_at
    new = apply(Patch(data='{"x":1}'), old, NOW, fold=fold)
    assert (new.state, new.state_expires_at) == (old.state, old.state_expires_at)


@given(contents, st.floats(0.1, 1000))
def test_each_write_restarts_the_ttl_of_its_part(old, seconds):
    ttl = Ttl(seconds)
    assert apply(Patch("x"), old, NOW, fold=fold, state_ttl=ttl).state_expires_at == NOW + seconds
    new = apply(Patch(merge=('{"x":1}',)), old, NOW, fold=fold, data_ttl=ttl)
    assert new.data_expires_at == NOW + seconds


@given(contents, st.floats(0.1, 1000))
def test_keep_leaves_the_expiry_of_a_live_part_and_starts_that_of_an_empty_one(old, seconds):
    ttl = Ttl(seconds, keep=True)
    new = apply(Patch("x"), old, NOW, fold=fold, state_ttl=ttl)
    was_live = old.live_state(NOW) is not None
    assert new.state_expires_at == (old.state_expires_at if was_live else NOW + seconds)


@given(contents, st.floats(0.1, 1000))
def test_renew_moves_the_expiry_and_nothing_else(old, seconds):
    ttl = Ttl(seconds, renew=True)
    new = apply(Patch(), old, NOW, fold=fold, state_ttl=ttl, data_ttl=ttl)
    assert new.live_state(NOW) == old.live_state(NOW)
    assert new.live_data(NOW) == old.live_data(NOW)
    assert new.state_expires_at == (None if new.state is None else NOW + seconds)


@given(patches, contents)
def test_a_record_left_with_nothing_is_due_for_the_sweep(patch, old):
    new = apply(patch, old, NOW, fold=fold)
    if new.state is None and new.data == EMPTY:
        assert new.data_expires_at == NOW


@pytest.mark.parametrize(
    "ttl", [0, -1, 0.0, float("nan"), float("inf"), timedelta(0), timedelta.max, 10**400]
)
def test_a_ttl_out_of_range_is_refused(ttl):
    with pytest.raises((ValueError, OverflowError)):
        ttl_seconds(ttl)


@pytest.mark.parametrize("ttl", [True, "2 days", b"1", [1]])
def test_what_is_no_ttl_is_refused(ttl):
    with pytest.raises(TypeError, match="seconds or a timedelta"):
        ttl_seconds(ttl)


@pytest.mark.parametrize(
    ("ttl", "seconds"),
    [(None, None), (2, 2.0), (0.1, 0.1), (timedelta(days=1), 86400.0), (MAX_TTL, 36525 * 86400.0)],
)
def test_a_ttl_is_seconds(ttl, seconds):
    assert ttl_seconds(ttl) == seconds


def test_never_is_no_expiry():
    assert apply(Patch("x"), Content(), NOW, fold=fold, state_ttl=NEVER).state_expires_at is None
