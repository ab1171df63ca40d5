// The chat page: a client of /v1/models and /v1/chat/completions, and of nothing else.
// What the model or the server says is only ever set as text.
"use strict";

const KEY = "qwen-aot-key"; // in sessionStorage
const RETRY_MS = 2000; // while the server loads
const NUMBERS = ["temperature", "top_p", "max_tokens"]; // settings, by their names in the API
const at = (id) => document.getElementById(id);
const messages = []; // what the next request sends, without the system prompt
let stopping = null; // the AbortController of the answer at work

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
    at("model").replaceChildren(...listed.map((model) => new Option(model.id, model.id)));
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
  messages.push({ role: "user", content: text });
  const question = show("user", text);
  const answer = show("assistant", "");
  const speed = new Speed();
  const draw = onceAFrame(() => {
    write(answer, said);
    speed.draw();
  });
  stopping = new AbortController();
  working(true);
  let said = "";
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
      if (choice && choice.delta.content) {
        said += choice.delta.content;
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
  if (said) {
    messages.push({ role: "assistant", content: said });
    write(answer, said);
  } else { // as if it hadn't been asked
    messages.pop();
    question.remove();
    answer.remove();
    if (!at("message").value) at("message").value = text;
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

function show(role, text) {
  const article = document.createElement("article");
  article.className = role;
  if (role === "error") article.setAttribute("role", "alert");
  const heading = document.createElement("h2");
  heading.textContent = NAMES[role];
  article.append(heading, document.createElement("div"));
  at("conversation").append(article);
  write(article, text);
  return article;
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
  at("clear").disabled = at("model").disabled = isWorking;
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
  if (!text.trim() || stopping || at("send").disabled || !areSettingsRight()) return;
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

at("clear").addEventListener("click", () => {
  messages.length = 0;
  at("conversation").replaceChildren();
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
