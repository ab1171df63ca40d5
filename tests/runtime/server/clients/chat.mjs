// What npm's `openai` package gets of a server, as one JSON object. Arguments: base URL, key.
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];
const weather = { type: "function", function: { name: "weather", parameters: { type: "object" } } };
const found = {};

found.models = (await client.models.list()).data.map((model) => model.id);

const whole = await client.chat.completions.create({ model: "toy", messages, max_completion_tokens: 8, temperature: 0 });
found.whole = { content: whole.choices[0].message.content, tokens: whole.usage.completion_tokens };

const chunks = [];
const stream = await client.chat.completions.create({
  model: "toy", messages, max_completion_tokens: 8, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) chunks.push(chunk);
found.streamed = {
  content: chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""),
  tokens: chunks.at(-1).usage.completion_tokens,
};

const helper = client.chat.completions.stream({ model: "toy", messages, max_completion_tokens: 8 });
found.gathered = await helper.finalContent();

const text = await client.completions.create({ model: "toy", prompt: "Hi", max_tokens: 6 });
found.text = text.choices[0].text;

const left = await client.chat.completions.create({ model: "toy", messages, stream: true });
for await (const chunk of left) if (chunk.choices[0]?.delta.content) break; // which aborts the request
found.left = left.controller.signal.aborted;

for (const [name, ask] of Object.entries({
  model: () => client.chat.completions.create({ model: "gpt", messages }),
  field: () => client.chat.completions.create({ model: "toy", messages, temperature: 9 }),
  tools: () => client.chat.completions.create({ model: "toy", messages, tools: [weather] }),
  key: () => new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).models.list(),
})) {
  try {
    await ask();
  } catch (error) {
    found[name] = [error.constructor.name, error.status, error.code, error.param];
  }
}
console.log(JSON.stringify(found));
