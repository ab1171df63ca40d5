"""`generate`: continues one prompt, streaming."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_aot.runtime.cli.command import VerbCommand, option
from qwen_aot.runtime.cli.console import count, print_json, put_answer, show_logs, tell
from qwen_aot.runtime.cli.opening import open_generator
from qwen_aot.runtime.cli.options import (
    CONTEXT,
    GivenPath,
    allow_bundle_code_option,
    allow_special_tokens_option,
    bundle_argument,
    generation_config,
    generation_options,
    json_option,
    kernels_option,
    no_speculate_option,
    require_generation,
    threads_option,
)
from qwen_aot.whole_file import write_whole

if TYPE_CHECKING:
    from qwen_aot.runtime.generation.request import Completion
    from qwen_aot.runtime.vision.pictures import Picture


@click.command("generate", cls=VerbCommand, context_settings=CONTEXT)
@bundle_argument
@option("--prompt", help="Text to continue.  [default: standard input, less a last line end]", group="Prompt")
@option("--prompt-ids", help="Token ids to continue, such as 1,2,3.", group="Prompt")
@option("--chat", "as_chat", is_flag=True, help="The prompt is a user's message: answer it.", group="Prompt")
@option("--system", help="System prompt, with --chat.  [default: the chat template's]", group="Prompt")
@option(
    "--image",
    "images",
    multiple=True,
    type=GivenPath(),
    help="A picture in front of the text; again for more. JPEG, PNG, WebP, GIF or BMP.",
    group="Prompt",
)
@option(
    "--draw-boxes",
    type=GivenPath(),
    metavar="OUT.png",
    help="Draw the boxes that the answer names onto the last picture.",
    group="Output",
)
@allow_special_tokens_option
@generation_options
@json_option
@threads_option
@kernels_option
@allow_bundle_code_option
@no_speculate_option
def command(
    bundle: Path,
    prompt: str | None,
    prompt_ids: str | None,
    as_chat: bool,
    system: str | None,
    images: tuple[Path, ...],
    draw_boxes: Path | None,
    allow_special_tokens: bool,
    as_json: bool,
    threads: int | None,
    kernels: str | None,
    allow_bundle_code: bool,
    speculate: bool,
    **settings: Any,
) -> None:
    """Continue a prompt with a bundle.

    \b
    Examples:
      qwen-aot generate ./bundle --prompt "The capital of France is"
      cat question.txt | qwen-aot generate ./bundle --chat --temperature 0 --json

    Text goes to stdout as it comes, counts and speed to stderr. A bundle without a tokenizer takes --prompt-ids and
    gives ids; one of Qwen-VL takes --image.
    """
    show_logs()
    if system is not None and not as_chat:
        raise click.UsageError("--system goes with --chat")
    if as_chat and prompt_ids is not None:
        raise click.UsageError("--chat takes text; give --prompt or standard input instead of --prompt-ids")
    if allow_special_tokens and not as_chat:
        raise click.UsageError("--allow-special-tokens goes with --chat: without it they are always read")
    _require_images(images, draw_boxes, prompt_ids)
    require_generation(settings)
    prompt_given = _prompt(prompt, prompt_ids)
    if not images and not (prompt_given.strip() if as_chat and isinstance(prompt_given, str) else prompt_given):
        raise click.UsageError("the prompt is empty; give text with --prompt or on standard input, or --prompt-ids 1,2")
    from qwen_aot.runtime.generation.request import Completion, Request
    from qwen_aot.runtime.vision.pictures import open_picture

    start = time.perf_counter()
    opening = open_generator(
        bundle, threads=threads, kernels=kernels, allow_bundle_code=allow_bundle_code, speculate=speculate
    )
    with opening as generator:
        load_seconds = time.perf_counter() - start
        config = generation_config(generator.defaults, settings)
        has_text = generator.tokenizer is not None
        last = open_picture(images[-1]) if images else None  # boxes are the last one's; no other is kept
        pictures: list[Picture | Path | bytes] = [] if last is None else [*images[:-1], last]
        if as_chat:
            parts: list[dict[str, object]] = [{"type": "image", "image": picture} for picture in pictures]
            said: object = [*parts, {"type": "text", "text": prompt_given}] if parts else prompt_given
            roles = (("system", system), ("user", said))
            messages = [{"role": role, "content": content} for role, content in roles if content is not None]
            request = generator.chat_request(messages, config, allow_special_tokens=allow_special_tokens)
        elif pictures:
            assert isinstance(prompt_given, str)
            request = generator.picture_request(pictures, prompt_given, config)
        else:
            request = Request(prompt_given, config)
        for event in generator.stream(request):
            if isinstance(event, Completion):
                if not as_json:
                    put_answer(f"{event.last_text}\n")
                    _show_speed(event)
                else:
                    print_json(_result(event, load_seconds, last))
                if draw_boxes is not None and last is not None:
                    _draw(draw_boxes, event.text or "", last)
            elif not as_json:
                put_answer(event.text if has_text else f"{event.token_id} ")


def _require_images(images: tuple[Path, ...], draw_boxes: Path | None, prompt_ids: str | None) -> None:
    if images and prompt_ids is not None:
        raise click.UsageError("--image takes text behind it; give --prompt or standard input instead of --prompt-ids")
    if draw_boxes is None:
        return
    if not images:
        raise click.UsageError("--draw-boxes draws onto a picture; give one with --image")
    if draw_boxes.suffix.lower() != ".png":
        raise click.UsageError(f"--draw-boxes is {draw_boxes}; accepted: a file that ends in .png")


def _draw(out: Path, text: str, picture: Picture) -> None:
    """Writes the picture with the boxes that a text names; where it names none, nothing is written."""
    from qwen_aot.runtime.vision.boxes import draw_boxes, find_boxes

    boxes = find_boxes(text)
    if not boxes:
        tell(f"[the answer names no boxes, so {out} isn't written]")
        return
    buffer = io.BytesIO()
    draw_boxes(picture, boxes).image.save(buffer, "PNG")
    try:
        write_whole(out, buffer.getvalue())
    except OSError as error:
        raise click.ClickException(f"{out} can't be written: {error.strerror}") from error
    tell(f"[boxes drawn onto {out}: {len(boxes)}]")


def _prompt(text: str | None, ids: str | None) -> str | list[int]:
    if text is not None and ids is not None:
        raise click.UsageError("--prompt and --prompt-ids exclude each other; give one")
    if ids is not None:
        parts = ids.replace(",", " ").split()
        if not all(part.isascii() and part.isdecimal() for part in parts):
            raise click.UsageError(f"--prompt-ids is {ids!r}; accepted: whole numbers of 0 or more, such as 1,2,3")
        return list(map(int, parts))
    if text is None:
        if sys.stdin.isatty():
            raise click.UsageError("there is no prompt: give --prompt, --prompt-ids, or text on standard input")
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise click.UsageError(f"standard input isn't UTF-8 ({error.reason} at byte {error.start})") from None
        text = text.removesuffix("\n")  # which `echo` and editors add; a model takes it for the end of its sentence
    return text


def _result(completion: Completion, load_seconds: float, picture: Picture | None) -> dict[str, Any]:
    from qwen_aot.runtime.vision.boxes import find_boxes

    timings = completion.timings
    boxes = find_boxes(completion.text or "") if picture is not None else []
    return {
        "text": completion.text,
        "boxes": [{**asdict(box), "pixels": list(box.pixels(picture.size))} for box in boxes if picture is not None],
        "token_ids": list(completion.token_ids),
        "finish_reason": str(completion.finish_reason),
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "load_seconds": load_seconds,
        "prefill_seconds": timings.prefill,
        "first_token_seconds": timings.first_token,
        "decode_seconds": timings.decode,
        **dict(zip(("prefill_tokens_per_second", "decode_tokens_per_second"), speeds(completion), strict=True)),
    }


def speeds(completion: Completion) -> tuple[float | None, float | None]:
    """Tokens per second of prefill and decode; None where there was nothing to time."""
    timings = completion.timings
    decoded = len(completion.token_ids) - 1  # the first token comes with the prefill
    prefill = (completion.prompt_tokens - completion.cached_tokens) / timings.prefill if timings.prefill else None
    return prefill, decoded / timings.decode if decoded > 0 and timings.decode else None


def _show_speed(completion: Completion) -> None:
    prefill, decode = speeds(completion)
    parts = [count(completion.prompt_tokens, "prompt token") + (f" at {prefill:.0f}/s" if prefill else "")]
    parts.append(f"{len(completion.token_ids)} new" + (f" at {decode:.1f}/s" if decode else ""))
    tell(f"[{', '.join(parts)}, ended by {completion.finish_reason}]")
