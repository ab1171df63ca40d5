"""What `langchain-openai` gets of a server, as one JSON object. Arguments: base URL, key."""

import json
import sys

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

url, key = sys.argv[1:]
chat = ChatOpenAI(base_url=url, api_key=key, model="toy", temperature=0, max_tokens=200, max_retries=0)
found = {}

answer = chat.invoke([SystemMessage("Be brief"), HumanMessage("Hi")])
found["whole"] = [answer.content, answer.usage_metadata["output_tokens"]]
chunks = list(chat.stream("Hi"))
found["streamed"] = ["".join(chunk.content for chunk in chunks), len(chunks) > 3]
found["batch"] = [each.content for each in chat.batch(["Hi", "Ho"])]

weather = {"name": "weather", "description": "The weather", "parameters": {"type": "object", "properties": {}}}
bound = chat.bind_tools([weather])
called = bound.invoke("Is it raining?")
found["called"] = [[call["name"], call["args"]] for call in called.tool_calls]
gathered = None
for chunk in bound.stream("Is it raining?"):
    gathered = chunk if gathered is None else gathered + chunk
found["called in a stream"] = [[call["name"], call["args"]] for call in gathered.tool_calls]
told = [HumanMessage("Is it raining?"), called, ToolMessage("yes", tool_call_id=called.tool_calls[0]["id"])]
found["told"] = isinstance(bound.invoke(told), AIMessage)

found["text"] = OpenAI(base_url=url, api_key=key, model="toy", temperature=0, max_tokens=6, max_retries=0).invoke(
    "[assistant]"
)
try:
    ChatOpenAI(base_url=url, api_key=key, model="gpt", max_retries=0).invoke("Hi")
except openai.NotFoundError as error:
    found["model"] = error.code
print(json.dumps(found))
