"""Remakes tokenization.json: `python -m tests.golden.make_tokenization`.

Three byte-level tokenizers: GPT-2's split (tokenizer.json of this folder), Qwen's split with NFC, and SmolLM2's, which
cuts digits apart and lacks some bytes. A case is a text and its ids by the `tokenizers` library. `plain_ids` are those
where special tokens that the text spells are plain text: by a tokenizer whose special tokens have other names, and that
is else the same. Texts that aren't UTF-8 stand as hex, with the place of the first byte that isn't.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

FOLDER = Path(__file__).parent

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   and more    ",
    "it's we'll THEY'RE 'ſ I'D o'clock 'x '",
    "line\nend\r\n\r\n  \n indented\t\ttabs \x0b\x0c\u0085\u2028",
    "123 4 56,789.0 ²½٣Ⅷ 10kg",
    "naïve café, Ελληνικά, русский",
    "nai\u0308ve cafe\u0301",  # composed by NFC
    "a\u0323\u0307 a\u0307\u0323 \u1e69 s\u0323\u0307",  # marks out of order
    "\u212b \u2126 \uf900 \u0958",  # characters that NFC replaces
    "한국어 \u1112\u1161\u11ab\u1100\u116e\u11a8",
    "你好，世界。通义千问",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 flags 🇩🇪",
    "עברית العربية ไทย हिन्दी",
    "\u0300starts with a mark",
    "e\u0338\u0301\u0327\u0345\u0334" * 9,  # more marks than are sorted one by one
    "a" * 100,
    " a" * 60,
    "hellohello" * 12,
    "\x00\x01\x7f\ufffd\ufeff\u200b",
    "\U0010ffff\U000e0001\ue000",
    "#include <stdio.h>\nint main(void) { return 0; }\n",
    "<|im_start|>user\nhi<|im_end|>\n<tool>é你x</tool>",
    "<|im_start|><|im_end|><|im_end|",
    "<|im_<|im_start|>start|>",
    "<tool><tool>é你<|endoftext|>",
    "e<|im_end|>\u0301",  # the mark doesn't reach over a token
    "'<|im_end|>s 1<|im_end|>2",
]
INVALID = [
    (b"\xff", 0),
    (b"ab\xc3", 2),
    (b"a\xe2\x82", 1),
    (b"\xc0\xaf", 0),  # longer than needed
    (b"\xed\xa0\x80", 0),  # a surrogate
    (b"12345678\xf4\x90\x80\x80", 8),  # beyond Unicode
    ("é".encode() + b"\x80", 2),
]


def documents() -> dict[str, dict[str, Any]]:
    """tokenizer.json of each."""
    gpt2 = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
    digits = {"type": "Digits", "individual_digits": True}
    qwen2 = {
        **gpt2,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, PLAIN]},
    }
    smollm2 = {
        **gpt2,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, PLAIN | {"use_regex": True}]},
        "model": _without_bytes(gpt2["model"], gpt2["added_tokens"]),
    }
    return {"gpt2": gpt2, "qwen2": qwen2, "smollm2": smollm2}


def _without_bytes(model: dict[str, Any], added: list[dict[str, Any]]) -> dict[str, Any]:
    """A vocabulary with its added tokens, without some bytes: of those beyond ASCII that no merge uses, every third."""
    used = {part for merge in model["merges"] for part in merge}
    lacking = [token for token in model["vocab"] if len(token) == 1 and ord(token) > 0x7F and token not in used][::3]
    vocab = {token: id_ for token, id_ in model["vocab"].items() if token not in lacking}
    return {**model, "vocab": vocab | {token["content"]: token["id"] for token in added}}


def _renamed(document: dict[str, Any]) -> dict[str, Any]:
    """The same with special tokens that no text spells."""
    names = {token["content"]: f"\U000f0000{token['id']}" for token in document["added_tokens"] if token["special"]}
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in document["added_tokens"]]
    vocab = {names.get(token, token): id_ for token, id_ in document["model"]["vocab"].items()}
    return {**document, "added_tokens": added, "model": {**document["model"], "vocab": vocab}}


def main() -> None:
    """Writes the file beside this script."""
    cases = []
    for name, document in documents().items():
        tokenizer = Tokenizer.from_str(json.dumps(document))
        plain = Tokenizer.from_str(json.dumps(_renamed(document)))
        cases += [
            {"tokenizer": name, "text": text, "ids": tokenizer.encode(text).ids, "plain_ids": plain.encode(text).ids}
            for text in TEXTS
        ]
    invalid = [{"hex": data.hex(), "byte": place} for data, place in INVALID]
    tokenizers = {name: json.dumps(document) for name, document in documents().items() if name != "gpt2"}
    written = json.dumps({"tokenizers": tokenizers, "cases": cases, "invalid": invalid}, indent=1)
    (FOLDER / "tokenization.json").write_text(written + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
