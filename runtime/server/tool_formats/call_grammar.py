"""The grammar of answers that call functions, of any format's syntax."""

from __future__ import annotations

from qwen_aot.runtime.server.constraints.grammar import ANY_OBJECT, Grammar, HeldJson, literal, make_grammar
from qwen_aot.runtime.server.tool_formats.base import CallSyntax, Offer

__all__ = ["call_grammar"]


def call_grammar(syntax: CallSyntax, offer: Offer, content: HeldJson | None) -> Grammar | None:
    """What an answer may be.

    A required answer is calls alone, their arguments held to the functions' schemas. Another is text, in which a
    mark begins a call: its arguments are held to the schema of a strict function, else to be an object.

    Args:
        syntax: of the format.
        offer: the functions.
        content: what an answer that isn't a call is held to; None: nothing.

    Returns:
        None: it may be anything.
    """
    is_held = offer.is_required or content is not None
    if not is_held and offer.may_repeat is not False and not any(each.is_strict for each in offer.callable):
        return None
    rules: dict[str, str] = {}
    parts: dict[str, HeldJson] = {}
    for number, function in enumerate(offer.callable):
        schema = function.parameters if offer.is_required or function.is_strict else ANY_OBJECT
        parts[f"arguments_{number}"] = HeldJson(schema, function.where)
        before = literal(syntax.before_arguments.format(name=function.name))
        after = f" {literal(syntax.after)}" if syntax.after else ""
        rules[f"call_{number}"] = f"{before} arguments_{number}{after}"
    rules["call"] = " | ".join(f"call_{number}" for number in range(len(offer.callable)))
    is_repeated = syntax.between is not None and offer.may_repeat is not False
    end = f" ({literal(syntax.end)})?" if syntax.end else ""
    mark = literal(syntax.mark)
    if is_held:
        lead = "LEAD " if syntax.lead else ""
        if syntax.lead:
            rules["LEAD"] = f"/{syntax.lead}/"
        # One terminal with the mark: llguidance doesn't go back where another, such as the end, begins alike.
        more = f" ({literal(syntax.between or '', syntax.mark)} call)*" if is_repeated else ""
        start = f"{lead}{mark} call{more}{end}"
        if content is not None and not offer.is_required:
            parts["content"] = content
            start = f"content | {start}"
    else:
        rules["TEXT"] = r"/(.|\n)*/"
        rules["head[lazy]"] = f"TEXT {mark}"  # the first mark that comes ends it
        start = "(head call)* TEXT" if is_repeated else f"TEXT | head call{end}"
    where = "tools" if content is None or offer.is_required else content.where
    return make_grammar(start, rules, parts, where)
