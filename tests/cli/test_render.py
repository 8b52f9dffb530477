from collections.abc import Callable

import pytest

from tunesmith import phrases
from tunesmith.cli import render
from tunesmith.summaries import words


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (
            "plain text, Ça va, 日本語 👍 שלום 👩‍👩‍👧\n\tindented",
            "plain text, Ça va, 日本語 👍 שלום 👩‍👩‍👧\n\tindented",
        ),
        ("\x1b[31mred\x1b[0m\x1b]0;title\x07", "␛[31mred␛[0m␛]0;title␇"),
        ("line\rover\x9b2J", "line␍over⟨U+009B⟩2J"),
        ("back\x08space\x7f", "back␈space␡"),
        ("abc\u202edcba\u200b\ufeff", "abc⟨U+202E⟩dcba⟨U+200B⟩⟨U+FEFF⟩"),
        ("half a pair \ud83d", "half a pair ⟨U+D83D⟩"),
    ],
)
def test_what_cannot_be_seen_is_shown_by_a_sign(given: str, shown: str) -> None:
    assert phrases.visible(given) == shown
    assert phrases.visible(shown) == shown


@pytest.mark.parametrize(
    ("show", "shown"),
    [
        (phrases.duration, {0: "0 s", 59.4: "59 s", 59.6: "1:00 min", 185: "3:05 min", 7800: "2:10:00 h", -3: "0 s"}),
        (words.count, {999: "999", 9_999: "9,999", 12_345: "12.3 k", 134_515_008: "134.5 M", 1.7e9: "1.7 B"}),
        (phrases.size, {12: "12 B", 2048: "2.0 KiB", 3 * 2**20: "3.0 MiB", 2.5 * 2**30: "2.5 GiB"}),
        (words.age, {3: "just now", 60: "1 minute ago", 7300: "2 hours ago", 90_000: "1 day ago"}),
    ],
)
def test_numbers_as_text(show: Callable[[float], str], shown: dict[float, str]) -> None:
    assert {number: show(number) for number in shown} == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (5e-4, "0.0005"),
        ({"name": "lora", "rank": 16}, "lora (rank 16)"),
        ({"name": "lora", "rank": 16, "layers": (), "rank_pattern": {}, "dropout": 0.0}, "lora (rank 16, dropout 0)"),
        ({"name": "full"}, "full"),
        (["all-linear"], "all-linear"),
        (None, "null"),
        (True, "true"),
        ("a\x1bb", "a␛b"),
    ],
)
def test_options_as_they_would_be_written(value: object, shown: str) -> None:
    assert words.option(value) == shown


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (852, 1152, "about 17 min (14–19)"),
        (40, 80, "about 60 s (40–80)"),
        (4, 3700, "about 31 min (0.067–62)"),
        (0, 0.2, "about 0.1 s (0–0.2)"),
        (9000, 9001, "about 2.5 h"),
    ],
)
def test_a_range_of_time_says_its_unit_once(low: float, high: float, shown: str) -> None:
    assert phrases.between((low + high) / 2, low, high) == shown


def test_classes_that_are_numbers_are_told_from_their_rows() -> None:
    assert words.label_counts({"good": 80, "bad": 120}) == "2 classes: bad 120, good 80"
    assert words.label_counts({"5": 9, "4": 17, "r2": 3}) == "3 classes: 4: 17, 5: 9, r2: 3"


@pytest.mark.parametrize(("in_color", "shown"), [(True, "Hi Yes."), (False, "Hi ⟦Yes.⟧")])
def test_targets_of_a_row_are_known_without_colors(in_color: bool, shown: str) -> None:
    row = render.sample_row([("Hi ", False), ("Yes.", True)], in_color=in_color)
    assert row.plain.splitlines()[1] == shown
