"""Sums over a federation in memory: what is unmasked is the sum of the survivors, and nothing else comes out.

Each test of a refusal is a promise of `common/secagg`; what a refusal leaves behind is what was there before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, combinations, count, cycle
from secrets import token_bytes
from typing import Any

import numpy as np
import pytest
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st

from locum.common.envelope import seal
from locum.common.identity import PrivateKey, base64url
from locum.common.secagg import keys, site
from locum.common.secagg.aggregator import SecureSum
from locum.common.secagg.ring import CHUNK, Bits, Elements
from locum.common.secagg.roster import Context, SecureRefusal, threshold_of, verified
from locum.common.secagg.shares import PRIME, SHARE_BYTES, coefficients
from locum.common.secagg.site import Ready, Request, answer_purpose, commitment
from locum.common.secagg.upload import BOXES, COMMITMENTS, SCALARS, UPDATE, Given, Layout
from tests.common.secagg.federation import Federation, Upload, body_of, given, quantised, resigned

RINGS: tuple[Bits, ...] = (32, 64)
FOUR = ("a", "b", "c", "d")
#: Of an update; around where a piece of it ends.
ODD = (1, 3, 7, 31)
EDGES = (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7)


@cache
def _federation(sites: int) -> tuple[Federation, Iterator[int]]:
    """Sites that are ready, and the steps that are left."""
    return Federation("abcdefghijklm"[:sites]).set_up(), count(1)


def _subsets(names: Sequence[str], least: int, most: int | None = None) -> Iterator[tuple[str, ...]]:
    sizes = range(least, len(names) + 1 if most is None else most + 1)
    return chain.from_iterable(combinations(names, size) for size in sizes)


def _plain(layout: Layout, given: Mapping[str, Given], names: Sequence[str]) -> tuple[Elements, Elements]:
    """The sums in the ring that nobody has masked: scalars and update."""
    scalars, updates = zip(*(quantised(layout, given[name]) for name in names), strict=True)
    return np.sum(scalars, axis=0, dtype=np.uint64), np.sum(updates, axis=0, dtype=layout.ring.dtype)


def _lanes(total: SecureSum) -> tuple[bytes, bytes]:
    return total.scalars.tobytes(), total.update.tobytes()


def _is_masked(total: SecureSum, plain: tuple[Elements, Elements]) -> bool:
    """Whether no element is the sum's own, but for a coincidence or two."""
    pairs = zip((total.scalars, total.update), plain, strict=True)
    return all(int((one == other).sum()) <= one.size // 1000 for one, other in pairs)


# --- sums


@pytest.mark.parametrize("bits", RINGS)
@pytest.mark.parametrize("sites", range(3, 8))
def test_whoever_gives_and_whoever_answers_the_sum_is_that_of_the_survivors(sites: int, bits: Bits) -> None:
    federation, steps = _federation(sites)
    threshold, sizes = threshold_of(sites), cycle(ODD)
    for survivors in _subsets(federation.names, threshold):
        layout, context = federation.layout(next(sizes), bits), federation.context(next(steps))
        values = {name: given(np.linspace(-1, 1, layout.size) / (at + 1)) for at, name in enumerate(federation.names)}
        uploads = federation.uploads(context, layout, {name: values[name] for name in survivors})
        total, plain = federation.folded(context, layout, uploads), _plain(layout, values, survivors)
        answers = {name: federation.answer(name, federation.request(total, name)) for name in survivors}
        for answering in [survivors[1:threshold], *_subsets(survivors, threshold)]:
            total = federation.folded(context, layout, uploads)
            for name in answering:
                total.take(name, answers[name])
            if len(answering) < threshold:
                _refused_and_masked(total, plain)
            else:
                assert total.unmask(3) == []
                assert _lanes(total) == (plain[0].tobytes(), plain[1].tobytes())


def _refused_and_masked(total: SecureSum, plain: tuple[Elements, Elements], least: int = 3) -> None:
    before = _lanes(total)
    with pytest.raises(SecureRefusal):
        total.unmask(least)
    assert _lanes(total) == before
    assert _is_masked(total, plain)


@settings(deadline=None, max_examples=20)
@examples(st.data())
def test_whatever_is_given_the_sum_is_exact(data: st.DataObject) -> None:
    sites, bits = data.draw(st.integers(3, 7)), data.draw(st.sampled_from(RINGS))
    federation, steps = _federation(sites)
    names, threshold = list(federation.names), threshold_of(sites)
    layout = federation.layout(data.draw(st.sampled_from(ODD + EDGES)), bits, bound=data.draw(st.floats(1e-3, 1e3)))
    context = federation.context(next(steps) + data.draw(st.integers(0, 2)))
    next(steps), next(steps)
    survivors = sorted(data.draw(st.lists(st.sampled_from(names), min_size=threshold, unique=True)))
    answering = data.draw(st.lists(st.sampled_from(survivors), min_size=threshold, unique=True))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = {name: _drawn(random, layout, data.draw(st.floats(0, 1))) for name in survivors}
    total = federation.collected(context, layout, values)
    for name in answering:
        total.take(name, federation.answer(name, federation.request(total, name)))
    assert total.unmask(3) == []
    plain = _plain(layout, values, survivors)
    assert _lanes(total) == (plain[0].tobytes(), plain[1].tobytes())


def _drawn(random: np.random.Generator, layout: Layout, weight: float) -> Given:
    """An update of two tensors, of which one is not in one piece."""
    cut = int(random.integers(0, layout.size + 1))
    values = random.uniform(-1, 1, layout.size).astype(np.float32) * np.float32(layout.ring.bound * 0.999)
    tensors = {"z": values[:cut], "b": values[cut:].reshape(-1, 1)}
    scalars = {"weight": np.array([weight]), "cases": np.array([float(random.integers(0, 1 << 20))])}
    return Given(tensors, weight, scalars)


def test_a_sum_of_scalars_alone_is_exact() -> None:
    federation, steps = _federation(4)
    layout, values = federation.layout(0), {name: given(np.empty(0), 0.5, 7) for name in FOUR}
    total = federation.unmasked(layout, values, step=next(steps), silent="d")
    assert _lanes(total) == (_plain(layout, values, FOUR)[0].tobytes(), b"")


# --- a federation whose sum of step 1 was given to


@pytest.fixture
def four() -> Federation:
    """Four sites that are ready; three must answer."""
    return _ready().copy()


@cache
def _ready() -> Federation:
    return Federation(FOUR).set_up()


def _values(layout: Layout, names: Sequence[str] = FOUR) -> dict[str, Given]:
    return {name: given(np.full(layout.size, 0.25)) for name in names}


def _collected(federation: Federation, names: Sequence[str] = FOUR, step: int = 1) -> SecureSum:
    layout = federation.layout()
    return federation.collected(federation.context(step), layout, _values(layout, names))


def _of(request: Request, survivors: Sequence[str]) -> Request:
    """The same request for other survivors, with what belongs to them."""
    headers = {name: request.headers[name] for name in request.headers if name in survivors}
    boxes = {name: request.boxes[name] for name in request.boxes if name in survivors}
    return replace(request, survivors=tuple(survivors), headers=headers, boxes=boxes)


# --- a sum's context


def _refused_context(state: Ready, context: Context, why: str) -> None:
    before = state.model_dump_json()
    with pytest.raises(SecureRefusal, match=why):
        site.mask(state, context)
    assert state.model_dump_json() == before


def test_a_sum_of_another_roster_gets_no_masks(four: Federation) -> None:
    context = four.context(1)
    _refused_context(four.sites["a"].ready, context.model_copy(update={"roster": "c" * 64}), "another roster")
    four.set_up()
    _refused_context(four.sites["a"].ready, context, "another roster")


def test_a_step_that_is_spent_gets_no_masks_again(four: Federation) -> None:
    layout, values = four.layout(), given(np.zeros(10))
    four.upload("a", four.context(3), layout, values)
    for step in (1, 2, 3):
        _refused_context(four.sites["a"].ready, four.context(step), "cannot be used")
        _refused_context(four.sites["a"].ready, four.context(step, model="d" * 64), "cannot be used")
    four.upload("a", four.context(4), layout, values)


def test_a_step_that_lies_too_far_ahead_gets_no_masks(four: Federation) -> None:
    state = four.sites["a"].ready
    _refused_context(state, four.context(site.MOST_SKIPPED + 1), "cannot be used")
    _refused_context(state, four.context(2**53 - 1), "cannot be used")
    site.check_context(state, four.context(site.MOST_SKIPPED))


def test_steps_without_a_site_cost_it_nothing(four: Federation) -> None:
    """A site that was away for some sums has masks that cancel with those of the others."""
    three, layout = FOUR[:3], four.layout()
    for step in (1, 2, 5):
        four.unmasked(layout, _values(layout, three), step=step)
    total = four.unmasked(layout, _values(layout), step=9)
    assert _lanes(total)[1] == _plain(layout, _values(layout), FOUR)[1].tobytes()


def test_an_upload_for_a_differing_model_is_not_added(four: Federation) -> None:
    layout = four.layout()
    total = four.open_sum(four.context(1), layout)
    upload = four.upload("a", four.context(1, model="d" * 64), layout, given(np.zeros(10)))
    with pytest.raises(SecureRefusal, match="another sum"):
        total.fold("a", *upload)
    assert total.survivors == ()
    assert not total.update.any()


def test_a_context_counts_only_with_the_coordinators_signature(four: Federation) -> None:
    context = four.context(1)
    key = four.log.public_key()
    assert verified(four.signed(context), Context, key) == context
    for forged in (
        resigned(four.signed(context), four.sites["b"].key),
        resigned(four.signed(context), four.log, kind="secagg upload"),
        resigned(four.signed(context), four.log, step=0),
        resigned(four.signed(context), four.log, step="1"),
        resigned(four.signed(context), four.log, step=True),
        _without(four.signed(context), "suite", four.log),
        resigned(four.signed(context), four.log, suite="locum-secagg-2"),
        resigned(four.signed(context), four.log, more=1),
        four.signed(context).replace('"step":1', '"step":2'),
        four.signed(context).replace(",", ", ", 1),
    ):
        with pytest.raises(SecureRefusal):
            verified(forged, Context, key)


def _without(envelope: str, field: str, key: PrivateKey) -> str:
    """A statement that leaves out what it must say."""
    found = json.loads(envelope)
    return seal(found["kind"], {name: value for name, value in found["body"].items() if name != field}, key).decode()


def test_the_metrics_of_a_model_are_one_sum_however_often_they_are_asked_for(four: Federation) -> None:
    one = four.context(1, purpose="validation", round=3)
    assert one.sum == four.context(7, purpose="validation", round=3, attempt=2).sum
    assert one.sum == four.context(7, purpose="validation", round=4).sum
    assert one.sum != four.context(1, purpose="test", round=3).sum
    assert one.sum != four.context(1, purpose="validation", round=3, model="d" * 64).sum


def test_a_round_that_is_tried_again_is_another_sum(four: Federation) -> None:
    one = four.context(1, round=3)
    assert one.sum == four.context(7, round=3).sum
    assert one.sum != four.context(1, round=3, attempt=2).sum
    assert one.sum != four.context(1, round=4).sum
    assert one.sum != four.context(1, purpose="validation", round=3).sum


# --- what a site does not answer


def _refused(
    federation: Federation, request: Request, why: str, *, least: int = 3, before: Sequence[str] | None = None
) -> None:
    state = federation.sites["a"].ready
    kept = state.model_dump_json()
    with pytest.raises(SecureRefusal, match=why):
        site.answer(state, request, least=least, before=before)
    assert state.model_dump_json() == kept


@pytest.mark.parametrize(("first", "second"), [(FOUR, FOUR[:3]), (FOUR[:3], FOUR), (FOUR[:3], ("a", "b", "d"))])
def test_no_site_is_both_alive_and_dead(four: Federation, first: tuple[str, ...], second: tuple[str, ...]) -> None:
    """Both answers together would show the upload of the site that is in one set of survivors alone."""
    request = four.request(_collected(four), "a")
    four.answer("a", _of(request, first))
    _refused(four, _of(request, second), "other survivors")
    four.answer("a", _of(request, first))


def test_a_second_survivor_set_is_refused_under_another_roster(four: Federation) -> None:
    _collected(four, step=1)
    four.set_up()
    request = four.request(_collected(four, step=1), "a")
    _refused(four, request, "other survivors", before=FOUR[:3])
    _refused(four, _of(request, FOUR[:3]), "other survivors", before=FOUR)
    four.answer("a", request, before=FOUR)


def test_an_answer_is_given_again_for_the_same_survivors(four: Federation) -> None:
    total = _collected(four)
    request = four.request(total, "a")
    purpose = answer_purpose(total.context, total.survivors, "a")
    once, again = (keys.unseal(four.private, purpose, four.answer("a", request)) for _ in range(2))
    assert once == again


@pytest.mark.parametrize(
    ("survivors", "why"),
    [
        (("a", "a", "b", "c"), "in its order"),
        (("a", "b", "b", "c"), "in its order"),
        (("b", "a", "c", "d"), "in its order"),
        (("d", "c", "b", "a"), "in its order"),
        (("a", "b", "c", "x"), "in its order"),
        (("x", "a", "b", "c"), "in its order"),
        (("a", "b", "c", ""), "in its order"),
        (("b", "c", "d"), "not among"),
        (("a", "b"), "are the least"),
        (("a",), "are the least"),
        ((), "are the least"),
    ],
)
def test_survivors_that_can_be_none_are_refused(four: Federation, survivors: tuple[str, ...], why: str) -> None:
    request = four.request(_collected(four), "a")
    _refused(four, _of(request, survivors), why)
    _refused(four, replace(request, survivors=survivors), why)


def test_a_sum_of_fewer_than_the_sites_own_least_is_refused(four: Federation) -> None:
    request = four.request(_collected(four), "a")
    _refused(four, _of(request, FOUR[:3]), "a sum of 3 sites; 4 are the least", least=4)
    _refused(four, request, "5 are the least", least=5)


def test_a_low_least_does_not_undercut_the_threshold(four: Federation) -> None:
    _refused(four, _of(four.request(_collected(four), "a"), ("a", "b")), "3 are the least", least=1)


def test_another_sum_than_the_last_is_not_answered(four: Federation) -> None:
    earlier = four.request(_collected(four, step=1), "a")
    _refused(four, replace(earlier, context=four.context(1, attempt=2)), "not the sum")
    _refused(four, replace(earlier, context=four.context(2)), "not the sum")
    later = four.request(_collected(four, step=2), "a")
    _refused(four, earlier, "not the sum")
    _refused(four, replace(later, boxes=earlier.boxes), "shares of a")
    _refused(four, replace(later, headers=earlier.headers), "another sum")


def test_a_site_that_has_not_given_does_not_answer(four: Federation) -> None:
    total = _collected(four, names=("b", "c", "d"))
    _refused(four, four.request(total, "a"), "not the sum")


def test_a_header_that_its_site_has_not_signed_for_this_sum_is_refused(four: Federation) -> None:
    request = four.request(_collected(four), "a")
    found, key = request.headers["b"], four.sites["b"].key
    for header in (
        resigned(found, key, context="e" * 64),
        request.headers["c"],
        resigned(found, four.sites["c"].key),
        resigned(found, key, site="c"),
        resigned(found, four.log),
        resigned(found, key, kind="secagg pair"),
        found.replace('"body":"', '"body":"0', 1),
        "",
        "\ud800",
    ):
        headers = {**request.headers, "b": header}
        _refused(four, replace(request, headers=headers), "secagg upload|canonical|another sum|UTF-8")
    four.answer("a", request)


def test_a_header_or_a_box_too_many_or_too_few_is_refused(four: Federation) -> None:
    request = four.request(_collected(four), "a")
    less = _of(request, FOUR[:3])
    why = "one header and one box"
    _refused(four, replace(request, headers=less.headers), why)
    _refused(four, replace(request, boxes=less.boxes), why)
    _refused(four, replace(less, headers=request.headers), why)
    _refused(four, replace(less, boxes=request.boxes), why)
    _refused(four, replace(request, headers={}, boxes={}), why)


def test_a_box_that_is_not_as_it_was_sealed_to_this_site_is_refused(four: Federation) -> None:
    total = _collected(four)
    request, other = four.request(total, "a"), four.request(total, "c")
    box = request.boxes["b"]
    swapped = {**request.boxes, "b": request.boxes["c"], "c": box}
    _refused(four, replace(request, boxes=swapped), "shares of b")
    _refused(four, replace(request, boxes=other.boxes), "shares of a")
    for wrong in (other.boxes["b"], b"", box[:-1], box[1:], box[:16], box + b"\0", bytes(len(box))):
        _refused(four, replace(request, boxes={**request.boxes, "b": wrong}), "shares of b")
    for at in range(0, len(box), 7):
        flipped = box[:at] + bytes([box[at] ^ 1]) + box[at + 1 :]
        _refused(four, replace(request, boxes={**request.boxes, "b": flipped}), "shares of b")


def test_shares_of_another_length_in_a_sound_box_are_refused(four: Federation) -> None:
    request = four.request(_collected(four), "a")
    key = four.sites["a"].ready.boxes["b"]
    for length in (0, SHARE_BYTES, 4 * SHARE_BYTES - 1, 4 * SHARE_BYTES + 1, 5 * SHARE_BYTES):
        boxes = {**request.boxes, "b": keys.close_box(key, bytes(length))}
        _refused(four, replace(request, boxes=boxes), "another length")


# --- what the aggregator does not add


def _not_added(total: SecureSum, name: str, upload: Upload, why: str) -> None:
    before, headers = _lanes(total), total.headers
    with pytest.raises(SecureRefusal, match=why):
        total.fold(name, *upload)
    assert (_lanes(total), total.headers) == (before, headers)


def test_an_upload_of_a_stranger_is_not_added(four: Federation) -> None:
    total = _collected(four, FOUR[:3])
    stranger = Federation(("a", "b", "c", "x"), root=four.root, log=four.log).set_up()
    layout = stranger.layout()
    upload = stranger.upload("x", stranger.context(1), layout, given(np.zeros(10)))
    _not_added(total, "x", upload, "not in the roster")
    _not_added(total, "d", upload, "not signed by the key expected")
    _not_added(total, "", upload, "not in the roster")


def test_a_site_gives_once(four: Federation) -> None:
    layout, context = four.layout(), four.context(1)
    uploads = four.uploads(context, layout, _values(layout))
    total = four.folded(context, layout, uploads)
    _not_added(total, "a", uploads["a"], "has given already")
    _not_added(total, "a", uploads["b"], "has given already")


def test_an_upload_in_another_form_is_not_added(four: Federation) -> None:
    layout, context = four.layout(), four.context(1)
    total = _collected(four, FOUR[1:])
    header, _, tensors = four.upload("a", context, layout, given(np.zeros(10)))
    changed: list[dict[str, Any]] = [{name: tensors[name] for name in tensors if name != gone} for gone in tensors]
    for name, array in tensors.items():
        changed += [
            {**tensors, name: array.astype(array.dtype.newbyteorder(">") if array.itemsize > 1 else "i1")},
            {**tensors, name: array.view(f"i{array.itemsize}")},
            {**tensors, name: array.astype("f8")},
            {**tensors, name: array[:-1]},
            {**tensors, name: np.concatenate([array, array])},
            {**tensors, name: array[None]},
            {**tensors, name: array[:0]},
        ]
    changed += [{**tensors, "more": np.zeros(1)}, {}]
    for wrong in changed:
        forged = resigned(header, four.sites["a"].key, body=body_of(wrong))
        _not_added(total, "a", (forged, body_of(wrong), wrong), "not those of an upload")


def test_an_upload_of_another_layout_is_not_added(four: Federation) -> None:
    context = four.context(1)
    total = _collected(four, FOUR[1:])
    for layout in (four.layout(11), four.layout(10, 64), four.layout(0)):
        upload = four.copy().upload("a", context, layout, given(np.zeros(layout.size)))
        _not_added(total, "a", upload, "not those of an upload")


def test_tensors_that_their_site_has_not_signed_are_not_added(four: Federation) -> None:
    layout, context = four.layout(), four.context(1)
    uploads = four.uploads(context, layout, _values(layout))
    total = four.folded(context, layout, {name: uploads[name] for name in FOUR[1:]})
    header, body, tensors = uploads["a"]
    _not_added(total, "a", (header, uploads["b"][1], uploads["b"][2]), "not those that it has signed")
    _not_added(total, "a", (header, body[:-1] + ("0" if body[-1] != "0" else "1"), tensors), "it has signed")
    _not_added(total, "a", (header, body.upper(), tensors), "it has signed")
    total.fold("a", header, body, tensors)


def test_a_header_by_another_sites_key_is_not_believed(four: Federation) -> None:
    layout, context = four.layout(), four.context(1)
    header, body, tensors = four.upload("a", context, layout, given(np.zeros(10)))
    total = _collected(four, FOUR[1:])
    for forged, why in (
        (resigned(header, four.sites["b"].key), "not signed by the key expected"),
        (resigned(header, four.log), "not signed by the key expected"),
        (resigned(header, four.sites["a"].key, site="b"), "another sum"),
        (resigned(header, four.sites["a"].key, context="e" * 64), "another sum"),
        (resigned(header, four.sites["a"].key, kind="secagg keys"), "no secagg upload"),
        ("\ud800", "UTF-8"),
    ):
        _not_added(total, "a", (forged, body, tensors), why)


def test_an_upload_of_an_earlier_step_is_not_added(four: Federation) -> None:
    layout = four.layout()
    earlier = four.upload("a", four.context(1), layout, given(np.zeros(10)))
    total = _collected(four, FOUR[1:], step=2)
    _not_added(total, "a", earlier, "another sum")


def test_nothing_is_added_to_a_sum_that_is_being_unmasked(four: Federation) -> None:
    layout, context = four.layout(), four.context(1)
    uploads = four.uploads(context, layout, _values(layout))
    total = four.folded(context, layout, {name: uploads[name] for name in FOUR[:3]})
    total.take("a", four.answer("a", four.request(total, "a")))
    _not_added(total, "d", uploads["d"], "closed")
    for name in ("b", "c"):
        total.take(name, four.answer(name, four.request(total, name)))
    assert total.unmask(3) == []
    _not_added(total, "d", uploads["d"], "closed")
    assert _lanes(total)[1] == _plain(layout, _values(layout), FOUR[:3])[1].tobytes()


def test_a_sum_is_unmasked_once(four: Federation) -> None:
    """The masks would be taken away twice, and the sum be another number."""
    total = four.unmasked(four.layout(), _values(four.layout()))
    before = _lanes(total)
    with pytest.raises(SecureRefusal, match="unmasked already"):
        total.unmask(3)
    assert _lanes(total) == before


# --- answers


def _not_taken(total: SecureSum, name: str, sealed: bytes, why: str) -> None:
    with pytest.raises(SecureRefusal, match=why):
        total.take(name, sealed)


def test_an_answer_of_who_is_no_survivor_is_not_taken(four: Federation) -> None:
    total = _collected(four, FOUR[:3])
    sealed = four.answer("a", four.request(total, "a"))
    _not_taken(total, "d", sealed, "no survivor")
    _not_taken(total, "x", sealed, "no survivor")


def test_an_answer_of_another_site_sum_or_survivors_is_not_taken(four: Federation) -> None:
    context, layout = four.context(1), four.layout()
    uploads = four.uploads(context, layout, _values(layout))
    total = four.folded(context, layout, uploads)
    three = four.folded(context, layout, {name: uploads[name] for name in FOUR[:3]})
    of_all = four.answer("a", four.request(total, "a"))
    of_three = four.answer("b", four.request(three, "b"))
    why = "not sealed to this key for this purpose"
    _not_taken(three, "a", of_all, why)
    _not_taken(total, "b", of_three, why)
    _not_taken(total, "b", of_all, why)
    _not_taken(_collected(four, step=2), "a", of_all, why)
    _not_taken(replace(total, private=keys.new_private()), "a", of_all, "no survivor")
    total.take("a", of_all)


def test_an_answer_that_was_cut_or_changed_is_not_taken(four: Federation) -> None:
    total = _collected(four)
    sealed = four.answer("a", four.request(total, "a"))
    for wrong in (b"", sealed[:-1], sealed[1:], sealed + b"\0", sealed[: keys.SEAL_BYTES], bytes(len(sealed))):
        _not_taken(total, "a", wrong, "not sealed")
    for at in range(0, len(sealed), 97):
        _not_taken(total, "a", sealed[:at] + bytes([sealed[at] ^ 0x80]) + sealed[at + 1 :], "not sealed")
    assert not total.enough
    for length in (0, SHARE_BYTES, 4 * SHARE_BYTES - 1, 5 * SHARE_BYTES):
        _not_taken(total, "a", _resealed(four, total, "a", bytes(length)), "another length")


def _resealed(federation: Federation, total: SecureSum, name: str, told: bytes) -> bytes:
    return keys.seal(federation.roster.answers, answer_purpose(total.context, total.survivors, name), told)


def _told(federation: Federation, total: SecureSum, name: str) -> bytes:
    """What an honest site would answer."""
    sealed = federation.answer(name, federation.request(total, name))
    return keys.unseal(federation.private, answer_purpose(total.context, total.survivors, name), sealed)


#: What a site that lies makes of its shares.
LIES: dict[str, Callable[[bytes], bytes]] = {
    "one share": lambda told: told[:-32] + token_bytes(32),
    "nothing but zeros": lambda told: bytes(len(told)),
    "no elements of the field": lambda told: PRIME.to_bytes(SHARE_BYTES) * (len(told) // SHARE_BYTES),
    "in another order": lambda told: told[SHARE_BYTES:] + told[:SHARE_BYTES],
    "the last alone": lambda told: told[:-SHARE_BYTES] + bytes(SHARE_BYTES),
}


def _with_liars(
    federation: Federation, total: SecureSum, liars: Sequence[str], lie: Callable[[bytes], bytes], silent: int = 0
) -> None:
    for name in total.survivors[silent:]:
        told = _told(federation, total, name)
        total.take(name, _resealed(federation, total, name, lie(told) if name in liars else told))


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("liars", [("a",), ("g",), ("a", "b"), ("b", "f"), ("f", "g")])
def test_wrong_shares_do_not_change_the_sum_and_who_gave_them_is_named(liars: tuple[str, ...], lie: str) -> None:
    """Of seven sites, up to c = min(2t − n − 1, t − 2) = 2 may lie; the five others are enough."""
    federation, steps = _federation(7)
    layout = federation.layout()
    values = _values(layout, federation.names)
    total = federation.collected(federation.context(next(steps)), layout, values)
    _with_liars(federation, total, liars, LIES[lie])
    assert total.unmask(3) == list(liars)
    plain = _plain(layout, values, federation.names)
    assert _lanes(total) == (plain[0].tobytes(), plain[1].tobytes())


def test_two_who_lie_together_may_put_the_blame_on_others_but_do_not_change_the_sum() -> None:
    """Their errors cancel wherever both are chosen: the seeds are right, and the honest do not fit to them."""
    federation, steps = _federation(7)
    layout = federation.layout()
    values = _values(layout, federation.names)
    total = federation.collected(federation.context(next(steps)), layout, values)
    first, second, *_ = coefficients([1, 2, 3, 4, 5])
    errors = {"a": second, "b": PRIME - first}
    for name in total.survivors:
        told = _told(federation, total, name)
        last = (int.from_bytes(told[-SHARE_BYTES:]) + errors.get(name, 0)) % PRIME
        total.take(name, _resealed(federation, total, name, told[:-SHARE_BYTES] + last.to_bytes(SHARE_BYTES)))
    assert len(total.unmask(3)) == 2
    plain = _plain(layout, values, federation.names)
    assert _lanes(total) == (plain[0].tobytes(), plain[1].tobytes())


@pytest.mark.parametrize(("liars", "silent"), [("abc", 0), ("efg", 0), ("fg", 1), ("d", 2)])
@pytest.mark.parametrize("lie", LIES)
def test_more_liars_than_that_leave_the_sum_masked(liars: str, silent: int, lie: str) -> None:
    federation, steps = _federation(7)
    layout = federation.layout(1000)
    values = _values(layout, federation.names)
    total = federation.collected(federation.context(next(steps)), layout, values)
    _with_liars(federation, total, liars, LIES[lie], silent)
    _refused_and_masked(total, _plain(layout, values, federation.names))


def test_a_liar_whose_name_comes_first_among_many_sites_does_not_stop_a_sum() -> None:
    """Of 13 sites 9 answer; most sets of 9 hold the liar, and so would the first few hundred in order."""
    federation, steps = _federation(13)
    layout = federation.layout()
    values = _values(layout, federation.names)
    total = federation.collected(federation.context(next(steps)), layout, values)
    _with_liars(federation, total, "a", LIES["one share"])
    assert total.unmask(3) == ["a"]
    assert _lanes(total)[1] == _plain(layout, values, federation.names)[1].tobytes()


def test_a_liar_who_answers_again_truly_is_no_liar(four: Federation) -> None:
    total = _collected(four)
    _with_liars(four, total, "a", LIES["one share"])
    total.take("a", four.answer("a", four.request(total, "a")))
    assert total.unmask(3) == []


@pytest.mark.parametrize("change", ["another seed's", "no seed's", "at another place"])
def test_a_site_that_has_committed_to_another_seed_spoils_the_sum_and_shows_nothing(
    four: Federation, change: str
) -> None:
    layout, context = four.layout(1000), four.context(1)
    uploads = four.uploads(context, layout, _values(layout))
    header, _, tensors = uploads["b"]
    wrong = np.array(tensors[COMMITMENTS])
    wrong[1] = {"another seed's": wrong[0], "no seed's": 0, "at another place": wrong[2]}[change]
    forged = {**tensors, COMMITMENTS: wrong}
    uploads["b"] = (resigned(header, four.sites["b"].key, body=body_of(forged)), body_of(forged), forged)
    total = four.folded(context, layout, uploads)
    for name in FOUR:
        total.take(name, four.answer(name, four.request(total, name)))
    _refused_and_masked(total, _plain(layout, _values(layout), FOUR))


def test_too_few_survivors_are_not_unmasked_by_the_aggregator(four: Federation) -> None:
    layout = four.layout(1000)
    total, values = _collected(four, FOUR[:2]), _values(layout)
    with pytest.raises(SecureRefusal, match="3 are the least"):
        total.unmask(2)
    total = four.collected(four.context(2), layout, values)
    for name in FOUR:
        total.take(name, four.answer(name, four.request(total, name)))
    _refused_and_masked(total, _plain(layout, values, FOUR), least=5)
    assert total.unmask(4) == []


# --- what is hidden


def test_two_sums_of_one_update_have_unrelated_uploads(four: Federation) -> None:
    layout, values = four.layout(4000), given(np.full(4000, 0.25))
    uploads = [four.upload("a", four.context(step), layout, values)[2] for step in (1, 2)]
    uploads += [_ready().copy().upload("a", four.context(1), layout, values)[2]]
    plain = quantised(layout, values)
    for one, other in combinations(uploads, 2):
        assert not _alike(one[UPDATE], other[UPDATE])
        assert not set(one[BOXES].reshape(-1, 16).view("V16").ravel().tolist()) & set(
            other[BOXES].reshape(-1, 16).view("V16").ravel().tolist()
        )
        difference = one[UPDATE] - other[UPDATE]
        assert len(np.unique(difference)) > 3990
        assert abs(float(np.mean(difference.view(np.int32), dtype=np.float64))) < 2**31 / 10
    for tensors in uploads:
        assert not _alike(tensors[UPDATE], plain[1])
        assert not np.isin(tensors[SCALARS], plain[0]).any()


def _alike(one: Elements, other: Elements) -> bool:
    return int((one == other).sum()) > 2


def _traces(state: Any) -> tuple[str, list[bytes]]:
    """A state as it lies on a disk, and all bytes in it."""

    def leaves(value: Any) -> Iterator[bytes]:
        if isinstance(value, bytes):
            yield value
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                yield from leaves(part)

    return state.model_dump_json(), list(leaves(state.model_dump()))


def _holds(state: Any, secret: bytes) -> bool:
    text, found = _traces(state)
    return base64url(secret) in text or secret.hex() in text or any(secret in part for part in found)


def test_no_private_key_of_a_pair_and_no_half_is_left_after_begin(four: Federation) -> None:
    halves = four.halves()
    joined = four.sites["a"].state
    private = joined.announced.pairs
    secrets = [private, private[:32], private[-32:], *joined.drawn.values()]
    assert all(_holds(joined, secret) for secret in (private, *joined.drawn.values()))
    four.begin("a", halves["a"])
    ready = four.sites["a"].ready
    assert not any(_holds(ready, secret) for secret in secrets)
    for peer in FOUR[1:]:
        four.begin(peer, halves[peer])
        assert not any(_holds(four.sites[peer].ready, secret) for secret in secrets)


def test_no_seed_of_a_step_is_left_after_it_was_masked(four: Federation) -> None:
    before = four.sites["a"].ready
    spent, masking = site.mask(before, four.context(1))
    seeds = [*masking.add, *masking.subtract]
    assert len(seeds) == 4
    assert {commitment(seed) for seed in seeds} == set(masking.commitments)
    assert not any(_holds(spent, seed) for seed in seeds)
    assert not any(_holds(spent, chain) for chain in before.chains.values())


def _reached(state: Ready, context: Context) -> tuple[set[bytes], set[bytes]]:
    """The commitments to the seeds, and the keys of boxes, that whoever has a state can derive for a sum."""
    salt, seeds, boxes = bytes.fromhex(context.digest), set(), set(state.boxes.values())
    for secret in (*state.chains.values(), *state.boxes.values(), state.models[:32], state.models[-32:]):
        key = secret
        for _ in range(20):
            seeds.add(commitment(keys.derive(key, "mask", salt)))
            boxes |= {keys.derive(key, f"shares {name}", salt) for name in FOUR}
            key = keys.derive(key, "ratchet")
    return seeds, boxes


def _opens(boxes: set[bytes], upload: Upload) -> list[int]:
    """The places whose boxes these keys open."""
    return [place for place, row in enumerate(upload[2][BOXES]) if any(_is_key(key, row.tobytes()) for key in boxes)]


def _is_key(key: bytes, box: bytes) -> bool:
    try:
        return bool(keys.open_box(key, box))
    except keys.SealError:
        return False


def test_a_stolen_state_does_not_open_the_sums_before(four: Federation) -> None:
    layout, earlier = four.layout(), four.context(2)
    four.unmasked(layout, _values(layout), step=1)
    old = {name: found.ready for name, found in four.sites.items()}
    uploads = four.uploads(earlier, layout, _values(layout))
    committed = {row.tobytes() for upload in uploads.values() for row in upload[2][COMMITMENTS]}
    seeds, boxes = _reached(old["a"], earlier)
    assert len(seeds & committed) == 3  # with the state before the sum it can be done
    assert _opens(boxes, uploads["b"])
    four.uploads(four.context(3), layout, _values(layout))
    for found in four.sites.values():
        seeds, boxes = _reached(found.ready, earlier)
        assert not seeds & committed
        assert not any(_opens(boxes, upload) for upload in uploads.values())


def test_a_stolen_state_of_the_same_step_tells_one_share_of_each_seed_and_no_seed(four: Federation) -> None:
    layout, context = four.layout(), four.context(1)
    uploads = four.uploads(context, layout, _values(layout))
    committed = {row.tobytes() for upload in uploads.values() for row in upload[2][COMMITMENTS]}
    seeds, boxes = _reached(four.sites["a"].ready, context)
    assert not seeds & committed
    for giver, upload in uploads.items():
        assert _opens(boxes, upload) == [0], giver
