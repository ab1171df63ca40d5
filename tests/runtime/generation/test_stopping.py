"""Stop strings: found across pieces, never shown in part."""

from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.generation.stopping import StopMatcher


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """The texts given out, the flushed one last, and whether a stop was met."""
    matcher = StopMatcher(stops)
    out = []
    for piece in pieces:
        text, is_stopped = matcher.push(piece)
        out.append(text)
        if is_stopped:
            return out, True
    return [*out, matcher.flush()], False


def test_a_stop_across_pieces_is_cut_off() -> None:
    assert run(["Hello", " wor", "ld EN", "D of", "x"], [" END"]) == (["Hello", " wor", "ld", ""], True)


def test_a_possible_start_is_held_back_and_given_later() -> None:
    assert run(["a<", "|b<|", "c"], ["<|end|>"]) == (["a", "<|b", "<|c", ""], False)
    assert run(["a<|"], ["<|end|>"]) == (["a", "<|"], False)


def test_the_stop_that_is_complete_first_wins() -> None:
    assert run(["xabcx"], ["abc", "b"]) == (["xa"], True)
    assert run(["xabx"], ["b", "ab"]) == (["x"], True)


def test_without_stops_nothing_is_held() -> None:
    assert run(["a", "b"], []) == (["a", "b", ""], False)


short = st.text("ab<", max_size=12)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: the shortest start of the text that ends in a stop decides."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


@given(pieces=st.lists(short, max_size=6), stops=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3))
def test_the_result_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    texts, is_stopped = run(pieces, stops)
    assert ("".join(texts), is_stopped) == expected("".join(pieces), stops)
