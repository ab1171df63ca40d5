"""Writes react_turns.json: a conversation with several calls and their results as Qwen-Agent's ReAct agent leads it.

    python -m tests.golden.make_react_turns

Needs Qwen-Agent 0.0.34 (`pip install qwen-agent numpy soundfile tqdm python-dateutil`), which is the reference: its
agent makes each prompt and reads each answer, and nothing of this repository is imported. The answers are written here,
in the form of https://github.com/QwenLM/Qwen/blob/main/examples/react_prompt.md; a model that goes on behind a call, as
one does without a stop text, makes up what is told apart as `unwanted`.

Source: https://github.com/QwenLM/Qwen-Agent/blob/main/qwen_agent/agents/react_chat.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qwen_agent.agents.react_chat import ReActChat
from qwen_agent.llm.schema import Message

OUT = Path(__file__).with_name("react_turns.json")
FUNCTIONS = [
    {
        "name": "train_search",
        "description": "Finds trains between two cities on a day.",
        "parameters": {
            "type": "object",
            "properties": {"from": {"type": "string"}, "to": {"type": "string"}, "day": {"type": "string"}},
            "required": ["from", "to"],
        },
    },
    {
        "name": "weather",
        "description": "查询城市的天气。",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "城市"}}},
    },
]


def called(thought: str, name: str, **arguments: Any) -> str:
    return f"{thought}\nAction: {name}\nAction Input: {json.dumps(arguments, ensure_ascii=False)}"


# Of each question: its answers, and what the functions that they call give.
QUESTIONS: list[tuple[str, list[str], list[str]]] = [
    (
        "Wie komme ich morgen nach Köln, and do I need an umbrella there?",
        [
            called("I have to find a train first.", "train_search", **{"from": "Bonn", "to": "Köln", "day": "morgen"}),
            called('There are trains. Now the weather\n in Köln: is it "wet"?', "weather", city="Köln"),
            "I now know the final answer\nFinal Answer: Take the RE 5 at 9:12; it rains, so bring an umbrella ☂.",
        ],
        ['{"trains": [{"name": "RE 5", "at": "9:12"}]}', "雨，12°C"],
    ),
    (
        "那上海呢？",
        [
            called("我应该查询上海的天气。", "weather", city="上海"),
            "我已经知道了天气。\nFinal Answer: 上海今天晴。",
        ],
        ["晴\nObservation: 25°C"],  # a result may say anything
    ),
]
UNWANTED = "\nObservation: sunny, I guess\nThought: So it is"


class Recorded(ReActChat):
    """The agent with answers and results that are written down."""

    def __init__(self, answers: list[str], results: list[str]) -> None:
        self.function_map = {each["name"]: SimpleNamespace(name=each["name"], function=each) for each in FUNCTIONS}
        self.answers, self.results = iter(answers), iter(results)
        self.steps: list[dict[str, Any]] = []

    def _call_llm(self, messages: list[Message], **options: Any) -> Iterator[list[Message]]:
        said = next(self.answers)
        has_action, action, action_input, thought = self._detect_tool(said)
        call = {"name": action, "arguments": json.loads(action_input)} if has_action else None
        prompt = [[message.role, message.content] for message in messages]
        self.steps.append({"prompt": prompt, "said": said, "content": thought if call else said, "call": call})
        yield [Message(role="assistant", content=said)]

    def _call_tool(self, tool_name: str, tool_args: Any = "{}", **options: Any) -> str:
        self.steps[-1]["result"] = next(self.results)
        return str(self.steps[-1]["result"])


def main() -> None:
    messages: list[Message] = []
    questions = []
    for question, answers, results in QUESTIONS:
        messages.append(Message(role="user", content=question))
        agent = Recorded(answers, results)
        *_, last = agent._run(messages, lang="en")
        messages.append(last[-1])
        questions.append({"question": question, "steps": agent.steps})
    document = {"functions": FUNCTIONS, "unwanted": UNWANTED, "questions": questions}
    OUT.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
