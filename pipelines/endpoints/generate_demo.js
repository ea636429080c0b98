// The page of `goldcrest serve --demo` for language models: a prompt, and its answer as it comes.
// Whatever comes from the server or the user is set as text, never as HTML.
"use strict";

const byId = (id) => document.getElementById(id);
let leaving = null; // ends the request that is under way

async function call(path, body, signal) {
  const token = byId("token").value;
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  const method = body ? "POST" : "GET";
  const response = await fetch(path, { method, headers, body: JSON.stringify(body), signal });
  if (response.status === 401) byId("door").hidden = false;
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

async function refresh() {
  const { data } = await (await call("v1/models")).json();
  byId("door").hidden = true;
  const texts = data.filter((model) => model.family !== "speech"); // this page has no microphone
  byId("model").replaceChildren(...texts.map((model) => new Option(model.id)));
  say("");
}

// The JSON of every event; an event ends with an empty line and may come in several pieces.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const content = part.slice("data: ".length);
      if (content === "[DONE]") return;
      yield JSON.parse(content);
    }
  }
}

async function go() {
  const text = byId("prompt").value;
  const chat = byId("chat").checked;
  const body = {
    model: byId("model").value,
    max_tokens: Number(byId("tokens").value),
    temperature: Number(byId("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
    ...(chat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
  };
  leaving = new AbortController();
  byId("answer").textContent = "";
  byId("stop").hidden = false;
  byId("go").disabled = true;
  const began = performance.now();
  try {
    const response = await call(chat ? "v1/chat/completions" : "v1/completions", body, leaving.signal);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        byId("answer").append(chat ? choice.delta.content ?? "" : choice.text);
      }
      if (event.usage) {
        const seconds = (performance.now() - began) / 1000;
        say(`${event.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s`);
      }
    }
  } finally {
    byId("stop").hidden = true;
    byId("go").disabled = false;
  }
}

function say(text, bad = false) {
  byId("say").textContent = text;
  byId("say").classList.toggle("bad", bad);
}

// Runs an action of the user; what goes wrong is said on the page.
function act(action) {
  return async (event) => {
    try {
      await action(event);
    } catch (error) {
      if (error.name === "AbortError") say("stopped");
      else say(error.message, true);
    }
  };
}

byId("go").onclick = act(go);
byId("stop").onclick = () => leaving.abort();
byId("enter").onclick = act(refresh);
act(refresh)();
