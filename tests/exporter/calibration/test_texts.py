"""The sample texts: long enough, clean, from listed sources, and none for calibration that is also for evaluation."""

from __future__ import annotations

import importlib.resources
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
from tokenizers import Regex, pre_tokenizers

from qwen_aot.exporter.calibration import texts
from qwen_aot.exporter.calibration.texts import KINDS, Sample, calibration_texts, evaluation_texts

SETS = {"calibration": calibration_texts, "evaluation": evaluation_texts}
FIELDS = ["Author", "Year", "Public domain", "Taken from", "Cut", "Begins"]

WORDS = 8  # a run of so many words that two works share is no chance
CHARACTERS = 24  # the same of Chinese, which has no spaces

# Qwen1.5's own split: no token goes across its pieces, so that a text has at least as many tokens as pieces.
PIECES = pre_tokenizers.Split(
    Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    behavior="isolated",
)
CHINESE_CHARACTERS_A_TOKEN = 2  # more than any Chinese text has on average with that vocabulary


def sources() -> dict[str, list[tuple[str, dict[str, str]]]]:
    """For each file that SOURCES.md names: its works, each with its title and its fields."""
    text = (importlib.resources.files(texts.__package__) / "texts" / "SOURCES.md").read_text(encoding="utf-8")
    return {name: parse_works(body) for name, body in re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.M | re.S)}


def parse_works(body: str) -> list[tuple[str, dict[str, str]]]:
    works = re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", body, re.M | re.S)
    return [
        (
            title,
            {name: " ".join(value.split()) for name, value in re.findall(r"^- ([^:]+): (.*(?:\n  .*)*)", rest, re.M)},
        )
        for title, rest in works
    ]


def fewest_tokens(sample: Sample) -> int:
    """A lower bound of a text's tokens, which needs no vocabulary."""
    if sample.kind == "chinese":
        return len(sample.text) // CHINESE_CHARACTERS_A_TOKEN
    return len(PIECES.pre_tokenize_str(sample.text))


def runs(sample: Sample) -> set[str]:
    """Every run of words and of Chinese characters; case, punctuation and blanks don't count."""
    text = unicodedata.normalize("NFKC", sample.text).casefold()
    words = re.findall(r"\w+", text)
    characters = "".join(re.findall(r"[\u3400-\u9fff]", text))
    return {" ".join(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1)} | {
        characters[at : at + CHARACTERS] for at in range(len(characters) - CHARACTERS + 1)
    }


def shared(some: Iterable[Sample], others: Iterable[Sample]) -> set[str]:
    return set().union(*map(runs, some)) & set().union(*map(runs, others))


def faults(text: str) -> list[str]:
    """What is unclean in a text."""
    found = []
    if unicodedata.normalize("NFC", text) != text:
        found.append("not NFC")
    if other := {mark for mark in text if mark != "\n" and unicodedata.category(mark) in ("Cc", "Cf", "Co", "Cn")}:
        found.append(f"control characters {other}")
    if "\ufffd" in text:
        found.append("a replacement character")
    if re.search(r"[ \u3000]$", text, re.M) or not re.search(r"\S\n\Z", text):
        found.append("blanks at ends of lines, or not one line end at the end")
    if word := re.search(r"gutenberg|copyright|licen[cs]e\b|all rights|e-?book", text, re.I):
        found.append(f"boilerplate: {word[0]}")
    return found


def mojibake(text: str) -> Counter[str]:
    """Characters that none of the three languages has."""
    return Counter(mark for mark in text if "\u0370" <= mark <= "\u1fff" or "\u2500" <= mark <= "\u27ff")


@pytest.mark.parametrize("purpose", SETS)
def test_every_kind_is_there_in_order(purpose: str) -> None:
    kinds = [sample.kind for sample in SETS[purpose]()]
    assert list(dict.fromkeys(kinds)) == list(KINDS)
    assert kinds == sorted(kinds, key=KINDS.index)


@pytest.mark.parametrize(
    ("purpose", "least"),
    [
        ("calibration", {"prose": 20_000, "code": 8_000, "chinese": 4_000}),
        (
            "evaluation",
            {"prose": 4_800, "code": 2_000, "chinese": 1_400},
        ),  # 8,200 together: the bound is below the truth
    ],
)
def test_texts_are_long_enough(purpose: str, least: dict[str, int]) -> None:
    found: Counter[str] = Counter()
    for sample in SETS[purpose]():
        found[sample.kind] += fewest_tokens(sample)
    assert all(found[kind] >= count for kind, count in least.items()), found


def test_fewest_tokens_counts_pieces() -> None:
    assert fewest_tokens(Sample("prose", "It isn't 42.\n")) == 7  # It| isn|'t| |4|2|.\n
    assert fewest_tokens(Sample("chinese", "一二三四")) == 2


def test_calibration_and_evaluation_share_nothing() -> None:
    assert shared(calibration_texts(), evaluation_texts()) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_passage_is_found(kind: str) -> None:
    """Negative control: a sentence of an evaluation text in other case, other spacing and without punctuation."""
    source = next(sample for sample in evaluation_texts() if sample.kind == kind)
    passage = source.text[200:420].upper().replace(" ", "\n\n").replace("，", "").replace("。", " ")
    planted = Sample("prose", "Nothing of it is here. " + passage)
    assert shared([*calibration_texts(), planted], evaluation_texts())


def test_a_text_shares_its_runs_with_itself() -> None:
    sample = Sample("prose", "one two three four five six seven eight nine")
    assert shared([sample], [sample]) == {
        "one two three four five six seven eight",
        "two three four five six seven eight nine",
    }
    assert not shared([sample], [Sample("prose", "two three four five six seven eight")])


@pytest.mark.parametrize("purpose", SETS)
def test_texts_are_clean(purpose: str) -> None:
    for sample in SETS[purpose]():
        assert faults(sample.text) == [], sample.text[:40]
        assert not mojibake(sample.text), sample.text[:40]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a\r\n", "control characters"),
        ("a\tb\n", "control characters"),
        ("\ufeffa\n", "control characters"),
        ("e\u0301\n", "not NFC"),
        ("a\ufffd\n", "a replacement character"),
        ("a \nb\n", "blanks"),
        ("a", "blanks"),
        ("a\n\n", "blanks"),
        ("The Project Gutenberg EBook\n", "boilerplate"),
        ("Under the MIT License\n", "boilerplate"),
    ],
)
def test_unclean_texts_are_found(text: str, fault: str) -> None:
    assert [entry for entry in faults(text) if entry.startswith(fault)]


def test_letters_of_other_alphabets_are_found() -> None:
    assert mojibake("芥щ之微") == Counter("щ")


@pytest.mark.parametrize("purpose", SETS)
def test_every_work_is_listed_in_its_order(purpose: str) -> None:
    listed = sources()
    for kind in KINDS:
        works = [sample.text for sample in SETS[purpose]() if sample.kind == kind]
        assert list(map(first_words, listed[f"{purpose}/{kind}.txt"])) == beginnings(
            works, listed[f"{purpose}/{kind}.txt"]
        )


def first_words(work: tuple[str, dict[str, str]]) -> str:
    return work[1]["Begins"]


def beginnings(found: Sequence[str], listed: Sequence[tuple[str, dict[str, str]]]) -> list[str]:
    """The beginning of each text, as long as the words listed at its place."""
    assert len(found) == len(listed)
    return [text[: len(work["Begins"])] for text, (_, work) in zip(found, listed, strict=True)]


def test_every_work_says_where_it_is_from() -> None:
    listed = sources()
    assert set(listed) == {f"{purpose}/{kind}.txt" for purpose in SETS for kind in KINDS}
    for works in listed.values():
        for title, fields in works:
            assert list(fields) == FIELDS, title
            assert all(fields.values()), title


def test_a_missing_field_shows() -> None:
    ((_, fields),) = parse_works("### A title\n\n- Author: someone\n  else\n- Year: 1\n")
    assert fields == {"Author": "someone else", "Year": "1"}
    assert list(fields) != FIELDS


def test_no_author_is_in_both_sets() -> None:
    authors = {
        purpose: {
            fields["Author"] for name, works in sources().items() if name.startswith(purpose) for _, fields in works
        }
        for purpose in SETS
    }
    assert len(authors["evaluation"]) == 6
    assert not authors["calibration"] & authors["evaluation"]


def test_the_folder_holds_what_is_listed() -> None:
    folder = importlib.resources.files(texts.__package__) / "texts"
    found = {
        f"{purpose.name}/{file.name}" for purpose in folder.iterdir() if purpose.is_dir() for file in purpose.iterdir()
    }
    assert found == set(sources())
