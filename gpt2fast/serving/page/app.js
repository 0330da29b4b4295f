// The page: a prompt, its continuation as it comes, and what the model thought on the way.

import { copy, element, percent, the, visible } from "./elements.js";
import { fieldsOf, Options } from "./options.js";
import { completion, request, ServerError } from "./protocol.js";
import { alternatives, Text } from "./text.js";

const ALTERNATIVES = 5;
const text = new Text(the("text"), the("tip"));
let options = null;
let running = null; // AbortController of the run that goes on
let attention = new Map(); // responses for this text, by layer and head
let remembering = null; // timer

// ---- A run

async function run() {
  if (running) return;
  forget();
  remember();
  const problem = options?.problem;
  if (problem) return show(new ServerError(problem, 400));
  const prompt = the("prompt").value;
  text.clear(prompt);
  running = new AbortController();
  attention = new Map();
  the("attention-note").textContent = "";
  busy(true);
  const clock = new Clock();
  try {
    const body = {
      model: the("model").value || undefined,
      prompt,
      stream_options: { include_usage: true },
      logprobs: Math.min(ALTERNATIVES, options?.mostAlternatives ?? 0),
      return_token_ids: true,
      ...options?.fields,
    };
    const chunks = completion(body, { key: the("key").value, signal: running.signal });
    for await (const chunk of chunks) {
      clock.take(chunk);
      await clock.pause();
    }
    clock.finish();
  } catch (error) {
    if (error.name === "AbortError") clock.finish("stopped");
    else {
      clock.finish("failed");
      show(error);
    }
  } finally {
    running = null;
    busy(false);
    if (text.coloring === "attention") look();
  }
}

function stop() {
  running?.abort();
}

function busy(is) {
  the("run").disabled = is;
  the("stop").disabled = !is;
  the("text").setAttribute("aria-busy", String(is));
  if (is) the("status").textContent = "Generating …";
  for (const id of ["copy", "continue"]) the(id).disabled = is || !text.generated;
}

/** Takes the chunks of a run, and measures. */
class Clock {
  constructor() {
    this.begin = this.drawn = performance.now();
    for (const id of ["first", "speed", "count", "read"]) the(id).textContent = "–";
  }

  take({ choices, usage }) {
    const [choice] = choices;
    if (choice) {
      text.append(choice);
      this.reason = choice.finish_reason ?? this.reason;
    }
    if (text.tokens.length) this.#measure();
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens;
      the("read").textContent = `${usage.prompt_tokens}${cached ? `, ${cached} cached` : ""}`;
    }
  }

  /** Let the browser draw and take keys where a fast server leaves it no time to. */
  async pause() {
    if (performance.now() - this.drawn < 50) return;
    await new Promise((resolve) => setTimeout(resolve));
    this.drawn = performance.now();
  }

  #measure() {
    const now = performance.now();
    const count = text.tokens.length;
    if (this.first === undefined) {
      Object.assign(this, { first: now, at: count });
      the("first").textContent = `${Math.round(now - this.begin)} ms`;
    }
    the("count").textContent = count;
    const seconds = (now - this.first) / 1000;
    if (count > this.at) the("speed").textContent = `${((count - this.at) / seconds).toFixed(1)} tok/s`;
  }

  finish(end = this.reason) {
    const seconds = ((performance.now() - this.begin) / 1000).toFixed(1);
    const ends = {
      stop: "Ended by itself", length: "Reached the length limit", stopped: "Stopped", failed: "Failed",
    };
    const count = text.tokens.length ? `, ${text.tokens.length} tokens in ${seconds} s` : "";
    the("status").textContent = `${ends[end] ?? end ?? "Ended"}${count}`;
  }
}

// ---- Errors

function show(error) {
  const box = the("error");
  const input = options?.blame(error.param);
  const facts = [error.status || null, error.type, error.code].filter(Boolean).join(" · ");
  box.replaceChildren(element("p", {}, error.message));
  if (error.retryAfter) box.append(element("p", {}, `Try again in ${error.retryAfter} s.`));
  if (facts) box.append(element("small", {}, facts));
  if (input) {
    const go = () => {
      the("settings").open = true;
      input.focus();
    };
    box.append(element("button", { type: "button", onclick: go }, `Go to ${error.param}`));
  }
  box.hidden = false;
  if (error.status === 401) the("key").focus();
}

function forget() {
  the("error").hidden = true;
  options?.blame(null);
}

// ---- The chosen token

text.onChoice = (place) => {
  const panel = the("token");
  const token = text.tokenAt(place);
  panel.hidden = !token;
  if (!token) return;
  const about = element("p", {}, "Token ", element("code", {}, visible(token.token)),
    `, number ${place - text.promptCount + 1}`, token.id === undefined ? "" : `, id ${token.id}`);
  const note = "The model's own probabilities, before temperature and the like. "
    + "Choose another token to continue from here with it.";
  panel.replaceChildren(about, element("p", { className: "hint" }, note),
    ...alternatives(token, (other) => instead(place, other)));
};

/** Continue from a token with another one in its place. */
function instead(place, other) {
  if (running) return;
  the("prompt").value = text.before(place) + other;
  run();
}

// ---- Attention

const layer = () => Number(the("layer").value);
const head = () => Number(the("head").value);

/** Ask for the attention of the layer and head that are set, and show it. */
async function look() {
  if (running || !text.ids.length) return;
  const key = `${layer()} ${head()}`;
  try {
    if (!attention.has(key)) {
      const body = { tokens: text.ids, layer: layer(), head: head() };
      const known = attention;
      const response = await request("attention", { body, key: the("key").value });
      known.set(key, await response.json());
      if (known !== attention || key !== `${layer()} ${head()}`) return; // out of date
    }
    text.attention = attention.get(key);
    tellAttention();
  } catch (error) {
    the("attention-note").textContent = error.message;
  }
}

function tellSliders() {
  for (const id of ["layer", "head"]) {
    const { value, max } = the(id);
    the(id).nextElementSibling.textContent = `${value} of 0–${max}`;
  }
}

function tellAttention() {
  const found = attention.get(`${layer()} ${head()}`);
  if (!found) return;
  const place = text.chosen >= 0 ? text.chosen : text.spans.length - 1;
  const row = found.weights[found.weights.length - found.tokens.length + place];
  the("attention-note").textContent = row
    ? `From ${visible(found.tokens[place])} to those before it. The first token takes ${percent(row[0])}; `
      + "the colors are scaled to the others."
    : `Only the newest ${found.weights.length} tokens have weights here: choose one of those.`;
}

function colorBy(coloring) {
  text.coloring = coloring;
  the("attention").hidden = coloring !== "attention";
  const isAttention = coloring === "attention";
  the("scale-low").textContent = isAttention ? "ignored" : "likely";
  the("scale-high").textContent = isAttention ? "looked at" : "unlikely";
  text.color();
  if (isAttention) look();
}

// ---- Links, key, colors

const COLORINGS = [...document.getElementsByName("coloring")];

/** Put all that is set into the page's address. */
function remember() {
  if (!options) return; // what they are to be is in the address
  const state = { prompt: the("prompt").value, ...options.state };
  const coloring = COLORINGS.find((radio) => radio.checked).value;
  if (coloring !== "probability") state.color = coloring;
  if (coloring === "attention") Object.assign(state, { layer: layer(), head: head() });
  history.replaceState(null, "", `#${new URLSearchParams(state)}`);
  const count = Object.keys(options.state).filter((name) => name !== "form").length;
  the("changes").textContent = count ? `${count} changed` : "";
}

/** The same once typing pauses: browsers allow only so many changes of the address. */
function rememberSoon() {
  clearTimeout(remembering);
  remembering = setTimeout(remember, 200);
}

/** What the page's address says: texts by name. */
const address = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

/** Set all that the address says. */
function restore() {
  const { prompt, color } = address();
  the("prompt").value = prompt ?? "";
  restoreOptions();
  const coloring = COLORINGS.find((radio) => radio.value === color) ?? COLORINGS[0];
  coloring.checked = true;
  colorBy(coloring.value);
}

/** Set what has limits that the server tells. */
function restoreOptions() {
  if (!options) return;
  const state = address();
  options.state = state;
  for (const id of ["layer", "head"]) the(id).value = state[id] ?? 0;
  tellSliders();
  remember();
}

function setTheme(theme) {
  the("theme").value = theme;
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
}

/** Read what the server has: its models, and the options of a request. */
async function connect() {
  const key = the("key").value;
  try {
    const [api, models] = await Promise.all(
      ["openapi.json", "v1/models"].map((path) => request(path, { key }).then((it) => it.json())),
    );
    const names = models.data.map((model) => element("option", {}, model.id));
    the("model").replaceChildren(...names);
    options = new Options(the("controls"), api);
    const { layer, head } = fieldsOf(api, "/attention");
    the("layer").max = layer.maximum;
    the("head").max = head.maximum;
    forget();
    restoreOptions();
  } catch (error) {
    show(error);
  }
}

function useKey() {
  sessionStorage.setItem("key", the("key").value);
  connect();
}

async function copied(button, content) {
  const label = button.textContent;
  await copy(content);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = label), 1500);
}

// ---- Events

function listen() {
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address holds settings
    the("prompt").focus();
  });
  the("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  the("stop").addEventListener("click", stop);
  the("copy").addEventListener("click", () => copied(the("copy"), text.generated));
  the("link").addEventListener("click", () => {
    remember();
    copied(the("link"), location.href);
  });
  the("continue").addEventListener("click", () => {
    the("prompt").value = text.prompt + text.generated;
    run();
  });
  the("reset").addEventListener("click", () => {
    if (options) options.state = {};
    forget();
    remember();
  });
  the("key").addEventListener("change", useKey);
  the("connection").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey();
  });
  the("theme").addEventListener("change", () => setTheme(the("theme").value));
  for (const radio of COLORINGS) radio.addEventListener("change", () => colorBy(radio.value));
  for (const id of ["layer", "head"]) the(id).addEventListener("change", look);
  the("attention").addEventListener("input", tellSliders);
  text.root.addEventListener("click", tellAttention);
  text.root.addEventListener("keyup", tellAttention);
  document.addEventListener("input", (event) => event.target.id !== "key" && rememberSoon());
  window.addEventListener("hashchange", restore);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run();
    } else if (event.key === "Escape") {
      the("tip").hidden = true;
      stop();
    }
  });
}

the("key").value = sessionStorage.getItem("key") ?? "";
setTheme(localStorage.getItem("theme") ?? "");
the("settings").open = window.matchMedia("(min-width: 60rem)").matches;
listen();
restore();
connect();
