"""A small model's call is taken as what it has read gives a reason for it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.agent.calls import Call, Nothing, Ref, parse_all, render, validate
from edge_agent.agent.meant import plain, plain_text
from edge_agent.agent.tool import Param, ToolSpec

FIND = ToolSpec(
    "find_rooms",
    "Find rooms.",
    [
        Param("city", "str", about="Where."),
        Param("nights", "int"),
        Param("rate", "float", required=False, about="Discount rate."),
        Param("share", "float", required=False, about="Share in per cent."),
        Param("pets_allowed", "bool", required=False),
        Param("kind", "choice", choices=["suite", "single room"], required=False),
        Param("stars", "int", required=False),
        Param("note", "str", required=False),
        Param("language", "str", required=False),
        Param("every_s", "int", required=False),
        Param("at", "str", required=False),
        Param("guests", "list", items=Param("guest", "str"), required=False),
        Param("prices", "list", items=Param("price", "float"), required=False),
    ],
)
ORIGIN = ToolSpec("weather", "The weather.", [Param("place", "str", about="City and state, like Austin, TX.")])


def meant(said: str, *read: str) -> str:
    return plain_text(said, [FIND, ORIGIN], read or ("Rooms in Bonn for 3 nights, please.",))


ROOM = 'find_rooms(city="Bonn", nights=3'


@pytest.mark.parametrize(
    "option",
    [
        "pets_allowed=true",
        'kind="suite"',
        "stars=4",
        'note="name"',
        "stars=3",  # the one 3 that was said is how many nights
        "rate=0.1",
        'note="quiet"',
        'note="2017"',
        'guests=["Anna"]',
    ],
)
def test_an_option_that_nothing_gives_a_reason_for_is_left_out(option: str) -> None:
    assert meant(f"{ROOM}, {option})") == f"{ROOM})"


@pytest.mark.parametrize("option", ["every_s=60", 'at="07:30"'])
def test_what_has_to_do_with_time_needs_some_number_or_a_word_of_time(option: str) -> None:
    room = 'find_rooms(city="Bonn", nights=1'
    assert meant(f"{room}, {option})", "A room in Bonn") == f"{room})"
    assert meant(f"{room}, {option})", "A room in Bonn for two") == f"{room}, {option})"


@pytest.mark.parametrize(
    ("option", "read"),
    [
        ("pets_allowed=true", "and I bring my pet"),
        ("pets_allowed=false", "no pets"),
        ('kind="suite"', "in suites"),
        ('kind="single room"', "singles"),
        ("stars=4", "four stars"),
        ("stars=3", "with 3 stars"),
        ("rate=0.1", "at 10 per cent off"),
        ("share=10.0", "at 10 % off"),
        ('note="quiet, please"', "say that it should be QUIET"),
        ('language="de"', "in German"),  # a code stands for a word
        ('guests=["Ann", "Bo"]', "for Ann"),
        ("every_s=3600", "again every hour"),
        ("stars=5", "with as many stars as possible"),
        ('note="name and mode"', "note name and mode"),
        ('at="07:30"', "at half past seven"),
        ('at="07:30"', "tomorrow morning"),
    ],
)
def test_an_option_with_a_word_or_a_number_of_what_was_read_stays(option: str, read: str) -> None:
    assert meant(f"{ROOM}, {option})", f"Rooms in Bonn for 3 nights, {read}.") == f"{ROOM}, {option})"


def test_a_result_and_an_earlier_request_are_reasons_too() -> None:
    call = f"{ROOM}, stars=4)"
    assert meant(call, "Rooms in Bonn for 3 nights.", '{"stars": 4}') == call


@pytest.mark.parametrize(
    "read",
    [
        "Zimmer in Bonn für 3 Nächte, bitte ruhig und mit Hund",
        "在波恩住3晚，要安静，可以带宠物",
        "Chambres à Bonn pour 3 nuits, et le chien est là",
    ],
)
def test_other_languages_have_other_words(read: str) -> None:
    call = f'{ROOM}, pets_allowed=true, kind="suite", stars=5, note="quiet")'
    assert meant(call, read) == call


def test_an_act_is_taken_at_its_word() -> None:
    act = msgspec.structs.replace(FIND, name="book", risk="act")
    call = 'book(city="Bonn, Germany", nights=3, rate=5.0, pets_allowed=true)'
    twice = f'{call}\nbook(city="Bonn, Germany", nights=3)'
    assert plain_text(twice, [act], ["Rooms in Bonn for 3 nights at 5% off"]) == twice


@pytest.mark.parametrize(
    ("said", "read", "means"),
    [
        ("rate=5.0", "5% off", "rate=0.05"),
        ("rate=0.005", "5% off", "rate=0.05"),
        ("rate=0.05", "5 percent off", "rate=0.05"),
        ("rate=5.0", "5% off, or 0.5% off", "rate=5.0"),  # which of them?
        ("share=5.0", "5% off", "share=5.0"),
        ("rate=5.0", "5 euros off, that is 5%", "rate=5.0"),  # it is said as it stands
        ("prices=[20.0, 21.0, 22.0, 20.0]", "20, 21, 22 and back", "prices=[20.0, 21.0, 22.0, 20.0]"),
        ("prices=[85.0, 90.0, 91.0, 91.0]", "between 85, 90 and 91", "prices=[85.0, 90.0, 91.0]"),
        ("prices=[5.0, 5.0, 5.0]", "each at 5", "prices=[5.0, 5.0, 5.0]"),
        ('guests=["Ann", "Bo", "Cy", "Bo"]', "for Ann, Bo and Cy", 'guests=["Ann", "Bo", "Cy"]'),
        ('note="the Old Town"', "near the Old Town", 'note="Old Town"'),
        ('note="the towel is old"', "note that the towel is old", 'note="the towel is old"'),
    ],
)
def test_what_is_nearly_said_becomes_what_was_said(said: str, read: str, means: str) -> None:
    assert meant(f"{ROOM}, {said})", f"Rooms in Bonn for 3 nights, {read}") == f"{ROOM}, {means})"


def test_a_place_keeps_what_is_asked_for_and_loses_what_nobody_said() -> None:
    assert meant('find_rooms(city="Bonn, Germany", nights=3)') == f"{ROOM})"
    assert (
        meant('find_rooms(city="Bonn, Germany", nights=3)', "3 nights in Bonn, in Germany")
        == 'find_rooms(city="Bonn, Germany", nights=3)'
    )
    said = 'find_rooms(city="Bonn, Old Town", nights=3, note="grade A, A")'
    assert meant(said, '3 nights in "Bonn, Old Town", note grade A, A') == said
    assert meant('weather(place="Bonn, NRW")') == 'weather(place="Bonn, NRW")'


def test_a_call_that_asks_for_no_more_than_the_one_before_is_not_made() -> None:
    assert meant(f"{ROOM})\n{ROOM}, stars=4)") == f"{ROOM})"
    more = f'{ROOM}, guests=["Ann", "Bo"])\n{ROOM}, guests=["Ann"])'
    assert meant(more, "3 nights in Bonn for Ann and Bo") == more.split("\n")[0]
    two = f'{ROOM})\nfind_rooms(city="Ulm", nights=3)'
    assert meant(two, "3 nights in Bonn and in Ulm") == two


def test_calls_that_name_each_other_keep_their_places() -> None:
    calls = [Call("weather", {"place": "Bonn"}), Call("weather", {"place": "Bonn"}), Call("weather", {"place": Ref(2)})]
    assert plain(calls, [FIND, ORIGIN], ["Bonn"]) == calls


def test_what_is_no_call_of_a_known_tool_stays_as_it_is() -> None:
    for said in ("none()", 'answer("3 rooms")', "other(a=1)", f"{ROOM}, colour=3)"):
        assert meant(said) == said


values = st.recursive(
    st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e6, 1e6) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(args=st.dictionaries(st.sampled_from([p.name for p in FIND.params] + ["x"]), values), read=st.text(max_size=80))
def test_whatever_a_call_holds_what_is_required_stays_and_nothing_is_added(args: dict[str, object], read: str) -> None:
    call = Call("find_rooms", args)
    made = plain([call, Nothing()], [FIND], [read])
    assert made[1:] == [Nothing()]
    assert isinstance(made[0], Call)
    assert set(made[0].args) <= set(args)
    assert {"city", "nights", "x"} & set(args) <= set(made[0].args)
    assert plain(made, [FIND], [read])[0].name == "find_rooms"


@given(st.sampled_from(["5% off", "a rate of 0.25 or 5 %", "3 nights", ""]), st.floats(0, 100))
def test_a_valid_call_stays_valid(read: str, rate: float) -> None:
    call = validate(Call("find_rooms", {"city": "Bonn", "nights": 3, "rate": rate}), [FIND])
    (made,) = plain([call], [FIND], [f"Rooms in Bonn for 3 nights, {read}"])
    assert isinstance(made, Call)
    assert validate(made, [FIND]) == made
    assert parse_all(render(made)) == [made]


@pytest.mark.parametrize(
    ("about", "value", "means"),
    [
        ("Day, in the form DD/MM/YYYY.", "2024-03-16", "16/03/2024"),
        ("mm-dd-yyyy", "2024-3-6", "03-06-2024"),
        ("format 'YYYY-mm-dd HH:MM:ss'", "2024-03-20T11:00", "2024-03-20 11:00:00"),
        ("YYYY-MM-DDTHH:MM", "2024-03-20 9:05:59", "2024-03-20T09:05"),
        ("YYYY-MM-DD HH:MM:SS", "2024-03-20", "2024-03-20 00:00:00"),
        ("DD/MM/YYYY", "2024-03-20T11:00", "2024-03-20T11:00"),  # the time would be lost
        ("DD/MM/YYYY", "16/03/2024", "16/03/2024"),
        ("DD/MM/YYYY", "next Monday", "next Monday"),
        ("The day.", "2024-03-16", "2024-03-16"),
        ("YYYY-MM-DDTHH:MM:SSZ", "2024-03-20T09:05:59Z", "2024-03-20T09:05:59Z"),
    ],
)
def test_a_date_has_the_form_that_the_note_writes(about: str, value: str, means: str) -> None:
    spec = ToolSpec("fares", "Fares.", [Param("day", "str", about=about)])
    assert plain_text(f'fares(day="{value}")', [spec], ["Fares, please"]) == f'fares(day="{means}")'
