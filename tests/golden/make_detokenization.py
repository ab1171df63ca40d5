"""Remakes tokenizer.json and detokenization.json: `python -m tests.golden.make_detokenization`.

The tokenizer is byte-level BPE as Qwen's is, with few merges. A case is a list of ids and the text that the
`tokenizers` library decodes them to, special tokens skipped; some end or break inside characters.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "",
    "Hello, world!",
    " leading and trailing ",
    "naïve café, Ελληνικά, русский",
    "你好，世界。通义千问",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 flags 🇩🇪",
    "e\u0301 combining a\u0308\u0323",
    "tabs\tand\nnew\r\nlines\x00",
    "\ufffd already replaced",
    "עברית العربية ไทย हिन्दी",
    "<|im_start|>user\nhi<|im_end|>\n<tool>x</tool>",
]


def make_tokenizer() -> Tokenizer:
    """256 bytes, a few merges, two special tokens and one that is added but not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>é你", normalized=False)])
    return tokenizer


def main() -> None:
    """Writes both files beside this script."""
    tokenizer = make_tokenizer()
    rng = random.Random(3)
    size = tokenizer.get_vocab_size()
    sequences = [tokenizer.encode(text).ids for text in TEXTS]
    sequences += [tokenizer.encode("a😀").ids[:n] for n in range(1, 5)]
    sequences += [[rng.randrange(size) for _ in range(30)] for _ in range(30)]
    cases = [{"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)} for ids in sequences]
    folder = Path(__file__).parent
    (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    document = json.dumps({"cases": cases}, indent=1)
    (folder / "detokenization.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
