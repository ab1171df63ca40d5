// The chat page: a client of /v1/models and /v1/chat/completions, and of nothing else. images.js is loaded before.
// What the model or the server says is only ever set as text.
"use strict";

const KEY = "qwen-aot-key"; // in sessionStorage
const RETRY_MS = 2000; // while the server loads
const NUMBERS = ["temperature", "top_p", "max_tokens"]; // settings, by their names in the API
const at = (id) => document.getElementById(id);
const messages = []; // what the next request sends, without the system prompt
let models = []; // entries of /v1/models
let stopping = null; // the AbortController of the answer at work
const images = new Images(say, () => messages.flatMap(urlsOf));

class ApiError extends Error {
  constructor(status, body) {
    const error = body && typeof body === "object" ? body.error : null;
    super(error && typeof error.message === "string" ? error.message : `the server answered ${status}`);
    this.status = status;
    this.code = error && error.code ? String(error.code) : "";
  }
}

async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers, redirect: "error", cache: "no-store" });
  if (!response.ok) throw new ApiError(response.status, await response.json().catch(() => null));
  return response;
}

async function loadModels() {
  try {
    const listed = (await (await call("/v1/models")).json()).data;
    models = listed;
    at("model").replaceChildren(...listed.map((model) => new Option(model.id, model.id)));
    modelChosen();
    at("model").disabled = at("send").disabled = false;
    at("key-form").hidden = true;
    say("Ready");
    at("message").focus();
  } catch (error) {
    if (error instanceof ApiError && error.status === 503) {
      say(error.message);
      setTimeout(loadModels, RETRY_MS);
    } else {
      failed(error);
    }
  }
}

function modelChosen() {
  images.setModel(models.find((model) => model.id === at("model").value));
}

// A message's content: a text, or images and a text behind them.
function contentOf(text, pictures) {
  if (!pictures.length) return text;
  const parts = pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } }));
  return text.trim() ? [...parts, { type: "text", text }] : parts;
}

function urlsOf(message) {
  return Array.isArray(message.content) ? message.content.flatMap((part) => (part.image_url ? [part.image_url.url] : [])) : [];
}

// Whether all settings are numbers in their ranges; else the browser says which isn't.
function areSettingsRight() {
  const wrong = NUMBERS.map(at).find((input) => !input.checkValidity());
  if (!wrong) return true;
  at("settings").open = true;
  wrong.reportValidity();
  return false;
}

function settings() {
  const chosen = {};
  for (const name of NUMBERS) {
    if (at(name).value !== "") chosen[name] = Number(at(name).value);
  }
  return chosen;
}

function conversation() {
  const system = at("system").value;
  return system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
}

// Events of a stream, as objects. https://html.spec.whatwg.org/multipage/server-sent-events.html
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the connection ended before the answer did");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function ask(text) {
  const pictures = images.take();
  messages.push({ role: "user", content: contentOf(text, pictures) });
  const question = show("user", text, pictures);
  const answer = show("assistant", "");
  const speed = new Speed();
  const draw = onceAFrame(() => {
    writeThought(answer, thought, !said && stopping !== null);
    write(answer, said);
    speed.draw();
  });
  stopping = new AbortController();
  working(true);
  let said = "";
  let thought = "";
  let end = "Done";
  try {
    const body = {
      model: at("model").value,
      messages: conversation(),
      stream: true,
      stream_options: { include_usage: true },
      ...settings(),
    };
    const response = await call("/v1/chat/completions", {
      method: "POST",
      body: JSON.stringify(body),
      signal: stopping.signal,
    });
    for await (const event of events(response)) {
      if (event.error) throw new ApiError(200, event);
      const choice = event.choices[0];
      if (choice && (choice.delta.content || choice.delta.reasoning_content)) {
        said += choice.delta.content || "";
        thought += choice.delta.reasoning_content || "";
        speed.piece();
        draw();
      }
      if (choice && choice.finish_reason === "length") end = "The answer was cut at its longest";
      if (event.usage) speed.count(event.usage.completion_tokens);
    }
  } catch (error) {
    if (stopping.signal.aborted) end = "Stopped";
    else end = failed(error);
  }
  if (!said && end === "Done") end = "The model answered nothing";
  if (said || thought) {
    messages.push({ role: "assistant", content: said, ...(thought ? { reasoning_content: thought } : {}) });
    writeThought(answer, thought, false);
    write(answer, said);
  } else { // as if it hadn't been asked
    messages.pop();
    question.remove();
    answer.remove();
    if (!at("message").value) at("message").value = text;
    images.restore([...pictures, ...images.chosen]);
  }
  speed.draw();
  working(false);
  say(end);
}

// Tokens of an answer and how fast they come. A piece of text is about a token; the server's count replaces that.
class Speed {
  constructor() {
    this.tokens = 0;
    this.isExact = false;
    this.first = this.last = 0;
    at("speed").textContent = "";
  }

  piece() {
    this.last = performance.now();
    if (!this.tokens) this.first = this.last;
    this.tokens += 1;
  }

  count(tokens) {
    this.tokens = tokens;
    this.isExact = true;
  }

  draw() {
    if (!this.tokens) return;
    const seconds = (this.last - this.first) / 1000;
    const rate = this.tokens > 1 && seconds > 0 ? `, ${((this.tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    at("speed").textContent = `${this.isExact ? "" : "about "}${this.tokens} tokens${rate}`;
  }
}

// A function that draws when the browser does, however often it is called: laying out each token would cost far more.
function onceAFrame(draw) {
  let isWaiting = false;
  return () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      draw();
    });
  };
}

function say(text) {
  at("status").textContent = text;
}

// Shows what a request failed of, as the server says it.
function failed(error) {
  const isAnswer = error instanceof ApiError;
  const text = isAnswer || error instanceof SyntaxError ? error.message : `The server can't be reached: ${error.message}`;
  const about = isAnswer ? [error.code, error.status === 200 ? "" : `HTTP ${error.status}`].filter(Boolean) : [];
  write(show("error", ""), about.length ? `${text} (${about.join(", ")})` : text);
  if (isAnswer && error.status === 401) {
    sessionStorage.removeItem(KEY);
    at("key-form").hidden = false;
    at("key").focus();
  }
  return "Failed";
}

const NAMES = { user: "You", assistant: "Model", error: "Error" };

function show(role, text, pictures = []) {
  const article = document.createElement("article");
  article.className = role;
  if (role === "error") article.setAttribute("role", "alert");
  const heading = document.createElement("h2");
  heading.textContent = NAMES[role];
  article.append(heading, ...pictures.map(thumbnail), document.createElement("div"));
  at("conversation").append(article);
  write(article, text);
  return article;
}

// Writes what a model thought before it answered, folded, above its answer.
function writeThought(article, text, isThinking) {
  if (!text) return;
  let box = article.querySelector("details");
  if (!box) {
    box = document.createElement("details");
    box.append(document.createElement("summary"), document.createElement("p"));
    article.lastElementChild.before(box);
  }
  const [summary, inside] = box.children;
  const title = isThinking ? "Thinking" : "Thought";
  if (summary.textContent !== title) summary.textContent = title;
  if (inside.textContent !== text) inside.textContent = text;
}

// Writes a message's text: code between lines that begin with ``` stands in <pre>, all else in <p>.
function write(article, text) {
  const box = at("conversation");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  const inside = article.lastElementChild;
  const parts = blocks(text);
  parts.forEach(({ isCode, content }, index) => {
    let element = inside.children[index];
    if (!element || (element.tagName === "PRE") !== isCode) {
      const made = document.createElement(isCode ? "pre" : "p");
      if (isCode) {
        made.tabIndex = 0; // so that a keyboard can scroll it
        made.append(document.createElement("code"));
      }
      if (element) element.replaceWith(made);
      else inside.append(made);
      element = made;
    }
    const target = isCode ? element.firstElementChild : element;
    if (target.textContent !== content) target.textContent = content;
  });
  while (inside.children.length > parts.length) inside.lastElementChild.remove();
  if (follows) box.scrollTop = box.scrollHeight;
}

function blocks(text) {
  const parts = [];
  let isCode = false;
  let lines = [];
  const close = () => {
    const content = lines.join("\n");
    if (isCode || content.trim()) parts.push({ isCode, content: isCode ? content : content.replace(/^\n+|\n+$/g, "") });
    lines = [];
  };
  for (const line of text.split("\n")) {
    if (/^ {0,3}```/.test(line)) {
      close();
      isCode = !isCode;
    } else {
      lines.push(line);
    }
  }
  close();
  return parts;
}

function working(isWorking) {
  at("conversation").setAttribute("aria-busy", String(isWorking)); // a screen reader waits for the whole answer
  at("send").hidden = isWorking;
  at("stop").hidden = !isWorking;
  at("clear").disabled = at("model").disabled = at("add-images").disabled = isWorking;
  if (isWorking) say("Answering");
  else stopping = null;
  at("message").focus();
}

function stop() {
  if (stopping) stopping.abort();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("message").value;
  const isEmpty = !text.trim() && !images.chosen.length;
  if (images.reading) return say("An image is still being read: send the message when it is shown");
  if (isEmpty || stopping || at("send").disabled || !areSettingsRight()) return;
  at("message").value = "";
  ask(text);
});

at("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // an input method's Enter chooses a word
  event.preventDefault();
  at("ask").requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stop();
});

at("stop").addEventListener("click", stop);
at("model").addEventListener("change", modelChosen);
at("add-images").addEventListener("click", () => at("files").click());

at("files").addEventListener("change", async () => {
  const files = [...at("files").files];
  at("files").value = ""; // so that the same file can be chosen again
  await images.add(files);
  at("message").focus();
});

at("message").addEventListener("paste", (event) => {
  const copied = event.clipboardData;
  if (!hasFiles(copied) || [...copied.types].includes("text/plain")) return; // office programs copy text as both
  if (images.most) event.preventDefault();
  images.add([...copied.files]);
});

for (const kind of ["dragover", "drop"]) { // else the browser would leave the page and show the file
  document.addEventListener(kind, (event) => {
    if (!hasFiles(event.dataTransfer)) return;
    event.preventDefault();
    if (kind === "drop") images.add([...event.dataTransfer.files]);
  });
}

at("clear").addEventListener("click", () => {
  messages.length = 0;
  at("conversation").replaceChildren();
  images.draw();
  at("speed").textContent = "";
  say("A new conversation");
  at("message").focus();
});

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  at("key").value = "";
  loadModels();
});

loadModels();
