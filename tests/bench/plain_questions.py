"""How many plain questions bundles of a chat model answer, so that rounding's loss shows in words too.

    python -m tests.bench.plain_questions BUNDLE...

Each question has one short answer that any chat model of this family should know; it counts where one of the accepted
spellings is in the first sentence or two, greedily generated, whatever stands around it. Forty questions tell losses
of a tenth apart, not of a hundredth: KL and perplexity (`qwen-aot compare`) do that.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import qwen_aot

ANSWER_TOKENS = 40
QUESTIONS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("What is the capital of France?", ("paris",)),
    ("What is the capital of Italy?", ("rome",)),
    ("What is the capital of Japan?", ("tokyo",)),
    ("What is the capital of Germany?", ("berlin",)),
    ("What is the capital of Spain?", ("madrid",)),
    ("What is the capital of Egypt?", ("cairo",)),
    ("What is the capital of China?", ("beijing",)),
    ("What is the capital of the United Kingdom?", ("london",)),
    ("On which continent is Brazil?", ("south america",)),
    ("On which continent is Kenya?", ("africa",)),
    ("Which planet do we live on?", ("earth",)),
    ("Which planet is closest to the Sun?", ("mercury",)),
    ("Which planet is the largest in our solar system?", ("jupiter",)),
    ("What do bees make?", ("honey",)),
    ("What gas do plants take in from the air?", ("carbon dioxide", "co2")),
    ("What gas do people need to breathe?", ("oxygen",)),
    ("At what temperature in Celsius does water boil?", ("100",)),
    ("At what temperature in Celsius does water freeze?", ("0",)),
    ("What is frozen water called?", ("ice",)),
    ("What is the chemical formula of water?", ("h2o", "h₂o")),
    ("How many days are in a week?", ("7", "seven")),
    ("How many months are in a year?", ("12", "twelve")),
    ("How many hours are in a day?", ("24", "twenty-four")),
    ("How many minutes are in an hour?", ("60", "sixty")),
    ("How many legs does a spider have?", ("8", "eight")),
    ("How many sides does a triangle have?", ("3", "three")),
    ("What is 2 + 2?", ("4", "four")),
    ("What is 5 times 5?", ("25", "twenty-five")),
    ("What is 10 minus 3?", ("7", "seven")),
    ("What colour is the sky on a clear day?", ("blue",)),
    ("What colour is grass?", ("green",)),
    ("What is the opposite of hot?", ("cold",)),
    ("What is the opposite of up?", ("down",)),
    ("What is a baby dog called?", ("puppy", "pup")),
    ("What is a baby cat called?", ("kitten",)),
    ("Who wrote Romeo and Juliet?", ("shakespeare",)),
    ("Who painted the Mona Lisa?", ("leonardo", "da vinci")),
    ("Which ocean lies between Europe and America?", ("atlantic",)),
    ("What language is spoken in Portugal?", ("portuguese",)),
    ("What day comes after Monday?", ("tuesday",)),
)


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an accepted spelling stands in an answer as whole words."""
    return any(re.search(rf"(?<!\w){re.escape(each)}(?!\w)", answer.lower()) for each in accepted)


def answers(generator: qwen_aot.Generator) -> list[str]:
    """What a generator answers to each question."""
    found = []
    for question, _ in QUESTIONS:
        messages: list[qwen_aot.Message] = [{"role": "user", "content": question}]
        found.append(generator.chat(messages, max_new_tokens=ANSWER_TOKENS, temperature=0).text or "")
    return found


def main() -> None:
    """Reads the command line, and prints a line for each bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    for bundle in parser.parse_args().bundles:
        with qwen_aot.load(bundle) as generator:
            given = answers(generator)
        wrong = [q for (q, accepted), answer in zip(QUESTIONS, given, strict=True) if not is_right(answer, accepted)]
        print(f"{bundle}: {len(given) - len(wrong)} of {len(given)}; not: {'; '.join(wrong) or 'none'}", flush=True)


if __name__ == "__main__":
    main()
