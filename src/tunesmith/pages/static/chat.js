// The same prompt to the base and to what was tuned from it, side by side; each side names the model that answered.
"use strict";
import {act, failure, say} from "./page.js";

const at = id => document.getElementById(id);
const talk = at("talk"), form = at("ask"), text = at("text"), stop = at("stop"), send = at("send"), again = at("again");
let models = [], running = null, histories = new Map();

function make(name, className, content = "") {
  const part = document.createElement(name);
  part.className = className;
  part.textContent = content;
  return part;
}

/** A side of one turn. @param {{name: string, is_base: boolean}} model */
function side(model) {
  const box = make("div", model.is_base ? "side" : "side tuned");
  const head = make("h3", "");
  const name = document.createElement("bdi");
  name.textContent = model.name;
  head.append(name, model.is_base ? " · the untouched base" : " · tuned");
  const words = make("div", "text"), count = make("p", "count");
  box.append(head, words, count);
  return {box, head: name, words, count};
}

/** The server's answer to a request. Throws its words where it refuses. */
async function post(address, body, signal) {
  const answer = await fetch(address, {
    method: "POST", headers: {"Content-Type": "application/json", "X-Tunesmith": "1"}, body: JSON.stringify(body), signal,
  });
  if (!answer.ok) throw new Error(await failure(answer));
  return answer;
}

async function chat(model, part, signal) {
  const history = histories.get(model.name) ?? [];
  const system = at("system").value.trim();
  const messages = [...(system ? [{role: "system", content: system}] : []), ...history];
  const body = {
    model: model.name, messages, stream: true, stream_options: {include_usage: true},
    temperature: Number(at("temperature").value), max_tokens: Number(at("most").value), seed: Number(at("seed").value),
  };
  const begun = performance.now();
  const answer = await post("/v1/chat/completions", body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "", whole = "", reason = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: {")) continue;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.model) part.head.textContent = chunk.model; // who answered, not who was meant to
      whole += chunk.choices[0]?.delta?.content ?? "";
      reason = chunk.choices[0]?.finish_reason ?? reason;
      part.words.textContent = whole;
      if (chunk.usage) {
        const seconds = (performance.now() - begun) / 1000, tokens = chunk.usage.completion_tokens;
        part.count.textContent = `${tokens} tokens · ${(tokens / seconds).toFixed(0)}/s${reason === "length" ? " · cut at the limit" : ""}`;
      }
    }
  }
  if (!whole) part.words.textContent = "(nothing)";
  histories.set(model.name, [...history, {role: "assistant", content: whole}]);
}

async function classify(model, part, signal, prompt) {
  const answer = await post("/v1/classify", {model: model.name, input: [prompt]}, signal);
  const values = await answer.json(), line = values.data[0];
  part.head.textContent = values.model;
  const shown = line.label ?? line.labels ?? line.value ?? line.score ?? line.tags;
  part.words.textContent = Array.isArray(shown) ? shown.join(", ") : shown === undefined ? JSON.stringify(line) : String(shown);
  const sorted = Object.entries(line.probabilities ?? {}).sort((a, b) => b[1] - a[1]).slice(0, 12);
  for (const [label, probability] of sorted) {
    const row = make("div", "probability"), name = document.createElement("bdi"), meter = document.createElement("meter");
    name.textContent = label;
    meter.value = probability;
    row.append(name, meter, make("span", "n", `${(100 * probability).toFixed(1)} %`));
    part.box.insertBefore(row, part.count);
  }
}

/** Texts in the order in which the model finds them near the query. */
async function rank(model, part, signal, query) {
  const texts = at("texts").value.split("\n").filter(line => line.trim());
  const request = async (address, body) => (await post(address, {model: model.name, ...body}, signal)).json();
  let ranked = [];
  if (model.answers === "embeddings") {
    const sought = await request("/v1/embeddings", {input: [query], input_type: "query"});
    const read = await request("/v1/embeddings", {input: texts});
    const length = vector => Math.hypot(...vector), goal = sought.data[0].embedding;
    const near = vector => vector.reduce((sum, value, i) => sum + value * goal[i], 0) / (length(vector) * length(goal));
    part.head.textContent = read.model;
    ranked = read.data.map(line => [texts[line.index], near(line.embedding)]).sort((a, b) => b[1] - a[1]);
  } else {
    const read = await request("/v1/rerank", {query, documents: texts});
    part.head.textContent = read.model;
    ranked = read.results.map(line => [texts[line.index], line.relevance_score]);
  }
  const list = make("ol", "ranked");
  for (const [words, near] of ranked) {
    const line = make("li", ""), name = document.createElement("bdi");
    name.textContent = words;
    line.append(name, make("span", "n", near.toFixed(3)));
    list.append(line);
  }
  part.words.replaceChildren(list);
}

async function ask() {
  const prompt = text.value;
  if (!prompt.trim() || running || !models.length || (at("texts") && !at("texts").value.trim())) return;
  running = new AbortController();
  send.disabled = true;
  stop.disabled = false;
  again.disabled = true; // its end would put this talk into the new one
  text.value = "";
  const turn = make("div", "two plain");
  talk.append(make("div", "ask-bubble", prompt), turn);
  form.scrollIntoView({block: "nearest"});
  await Promise.all(models.map(async model => {
    const part = side(model);
    turn.append(part.box);
    const before = histories.get(model.name) ?? [];
    try {
      if (model.answers === "text") {
        histories.set(model.name, [...before, {role: "user", content: prompt}]);
        await chat(model, part, running.signal);
      } else if (at("texts")) await rank(model, part, running.signal, prompt);
      else await classify(model, part, running.signal, prompt);
    } catch (error) {
      histories.set(model.name, before);
      part.box.classList.add("failed");
      part.count.textContent = error.name === "AbortError" ? "stopped" : error.message;
    }
  }));
  at("heard").textContent = [...turn.children].map(box => box.innerText).join("\n"); // whole, not token by token
  running = null;
  send.disabled = false;
  stop.disabled = true;
  again.disabled = false;
  text.focus();
  form.scrollIntoView({block: "nearest"});
}

function begin() {
  histories = new Map();
  talk.replaceChildren();
}

if (form) {
  models = JSON.parse(form.dataset.models);
  form.hidden = false;
  form.addEventListener("submit", event => { event.preventDefault(); ask(); });
  text.addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
    else if (event.key === "Escape") running?.abort();
  });
  stop.addEventListener("click", () => running?.abort());
  again.addEventListener("click", begin);
}

const choose = at("choose");
choose?.addEventListener("submit", async event => {
  event.preventDefault();
  const name = new FormData(choose).get("run");
  try {
    await act("POST", "/v1/deployments", {run: name});
    location.assign(`/ui/chat?run=${encodeURIComponent(name)}`);
  } catch (error) { say(error.message); }
});
