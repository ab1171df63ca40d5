"""A tokenizer of ranks (`qwen.tiktoken`), as the first Qwen models have it, made a byte-level BPE.

A line of the file is a token's bytes in base64 and its rank, which is its id. tiktoken joins whichever two neighbours
make the token of the lowest rank. Merges are recovered from that: a token's own bytes, joined by the tokens of lower
ranks, end as the two parts that make it. No other pair needs a rule: where two neighbours make a token, what lies
between its ends was joined as in the token alone, so they are these two.

Source: tokenization_qwen.py as published with the models; tiktoken's `_byte_pair_merge`.
"""

from __future__ import annotations

import base64
import binascii
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.bpe import byte_level_bpe
from qwen_aot.exporter.checkpoint.text_files import read_text

NAME = "qwen.tiktoken"

# Behind the last rank: for the published 151,643 ranks the ids 151643 to 151850.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205)))


# Behind those, of Qwen-VL: 151851 to 151859. The first six stand in texts, of users as of answers, so that they are
# read and shown wherever they are spelled; an image's are written by the program alone.
REGION_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_TOKENS = ("<img>", "</img>", "<imgpad>")


def read_tiktoken(path: Path, *, takes_images: bool = False) -> Tokenizer:
    """The tokenizer of a file of ranks, with Qwen's cut of text, NFC and special tokens.

    Args:
        path: of the file.
        takes_images: the model is Qwen-VL, whose tokenizer has more tokens behind the others.

    Raises:
        CheckpointError: the file can't be read, or isn't a vocabulary of such ranks.
    """
    ranks = _read_ranks(path)
    merges = _recover_merges(path, ranks)
    letters = _letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    tokens = (*SPECIAL_TOKENS, *REGION_TOKENS, *IMAGE_TOKENS) if takes_images else SPECIAL_TOKENS
    added = {
        len(ranks) + index: AddedToken(token, normalized=False, special=token not in REGION_TOKENS)
        for index, token in enumerate(tokens)
    }
    try:
        return byte_level_bpe(
            {written[token]: rank for token, rank in ranks.items()},
            [(written[left], written[right]) for left, right in merges],
            pre="qwen2",
            added=added,
        )
    except ValueError as error:
        raise CheckpointError(f"{path} can't be made a tokenizer ({error}); download it again") from error


# Bytes; the published files' longest has 128. Taking a token apart takes time with the square of its length.
_LONGEST_TOKEN = 256


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank, in the order of the ranks, which are 0, 1, 2, …; every byte is one."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            decoded, value = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{path} has the line {number} {line[:60]!r}; accepted: a token in base64 and its rank; download it "
                "again"
            ) from error
        if len(decoded) > _LONGEST_TOKEN:
            raise CheckpointError(
                f"{path} has a token of {len(decoded)} bytes in line {number}; accepted: up to {_LONGEST_TOKEN}"
            )
        if value != len(ranks) or not decoded or decoded in ranks:
            raise CheckpointError(
                f"{path} has the line {number} {line[:60]!r}; accepted: the rank {len(ranks)}, and a token that no "
                "line before it has; download it again"
            )
        ranks[decoded] = value
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(
            f"{path} has no rank for {len(missing)} single bytes, {missing[0]:#04x} for one; accepted: all 256; "
            "download it again"
        )
    return ranks


def _recover_merges(path: Path, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that make each longer one, in the order of the ranks."""
    merges = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = _join(token, ranks, below=rank)
        if len(parts) != 2:
            raise CheckpointError(
                f"{path}: the token {token!r} of rank {rank} isn't made of two tokens of lower ranks; download it again"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _join(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Bytes joined, always the neighbours of the lowest rank first, the leftmost of equals, by ranks below one."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 1:
        lowest, place = min(
            (ranks.get(left + right, below), index) for index, (left, right) in enumerate(pairwise(parts))
        )
        if lowest >= below:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _letters() -> dict[int, str]:
    """The letter of each byte in GPT-2's alphabet: printable bytes are themselves, the others U+0100 on, in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(letter): letter for letter in alphabet if ord(letter) < 256}
    others = (letter for letter in alphabet if ord(letter) >= 256)
    return {byte: own[byte] if byte in own else next(others) for byte in range(256)}
