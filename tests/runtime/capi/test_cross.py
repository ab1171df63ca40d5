"""Text, sampling and hashing compiled for aarch64 and run by qemu, by the same golden vectors; .ci/deep runs these."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.runtime.capi import test_detokenizer, test_sampling, test_tokenizer
from tests.runtime.capi.native import AARCH64, Native, ask, run
from tests.tools import require_tool

pytestmark = [pytest.mark.deep, pytest.mark.tools]


@pytest.fixture(scope="module")
def foreign(native_folder: Path) -> Native:
    """The library's inside for aarch64."""
    require_tool("aarch64-linux-gnu-g++", remedy="apt install g++-aarch64-linux-gnu")
    require_tool("qemu-aarch64", remedy="apt install qemu-user")
    return Native(native_folder, AARCH64)


def test_it_is_of_the_other_processor(foreign: Native) -> None:
    """Negative control: what passes here is not this machine's own."""
    foreign.program("sha256")
    assert "AArch64" in run(["readelf", "--file-header", foreign.folder / "sha256.aarch64"])


def test_ids(foreign: Native, tmp_path: Path) -> None:
    program = test_tokenizer.Program(foreign, tmp_path)
    for allow in (True, False):
        test_tokenizer.test_golden(program, allow)
    test_tokenizer.test_golden_texts_that_are_not_utf8(program)
    test_tokenizer.test_ids_are_the_library_s(program, "qwen2")


def test_texts(foreign: Native, tmp_path: Path) -> None:
    test_detokenizer.test_golden(test_detokenizer.Program(foreign, tmp_path))


def test_sampling_and_its_random_numbers(foreign: Native) -> None:
    program = foreign.program("sampling")
    test_sampling.test_the_chain_is_transformers(program)
    test_sampling.test_what_meets_a_cut_exactly(program)
    test_sampling.test_exp_is_within_its_bound(program)


def test_sha256(foreign: Native) -> None:
    documents = [bytes(range(256))[:length] for length in range(200)]
    answers = ask(foreign.program("sha256"), [{"pieces": [document.hex()]} for document in documents])
    for document, answer in zip(documents, answers, strict=True):
        expected = hashlib.sha256(document).hexdigest()
        # qemu's processor has the instructions.
        assert answer["default"] == answer["portable"] == answer["accelerated"] == expected
