"""Control tokens are found in texts as tokenizers match them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.tokenizer import _alternatives


@settings(max_examples=200)
@given(texts=st.lists(st.text("ab<|>", min_size=1, max_size=4), max_size=6), within=st.text("ab<|>", max_size=20))
def test_the_longest_text_that_stands_at_a_place_is_found(texts: list[str], within: str) -> None:
    found = [(match.start(), match.group()) for match in _alternatives(texts).finditer(within)]
    expected, at = [], 0
    while at < len(within):
        here = [text for text in texts if within.startswith(text, at)]
        if here:
            expected.append((at, max(here, key=len)))
        at += len(max(here, key=len)) if here else 1
    assert found == expected
