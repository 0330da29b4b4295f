// The text on the page: a span for each token, which keys and pointers reach.

import { element, percent, visible } from "./elements.js";

/** A prompt and its continuation, token by token. */
export class Text {
  /**
   * @param {HTMLElement} root takes the spans.
   * @param {HTMLElement} tip shows what is known of the token that is looked at.
   */
  constructor(root, tip) {
    Object.assign(this, { root, tip, spans: [], coloring: "probability", onChoice: () => {} });
    this.clear("");
    root.addEventListener("scroll", () => {
      const isAtEnd = root.scrollHeight - root.scrollTop - root.clientHeight < 40;
      this.follows = isAtEnd || (this.follows && root.scrollTop >= this.top);
      this.top = root.scrollTop;
    });
    root.addEventListener("pointerover", (event) => this.#look(event.target));
    root.addEventListener("pointerleave", () => this.#look(root.querySelector(":focus-visible")));
    root.addEventListener("focusin", (event) => this.#look(event.target));
    root.addEventListener("focusout", () => this.#look(null));
    root.addEventListener("click", (event) => this.choose(this.spans.indexOf(event.target)));
    root.addEventListener("keydown", (event) => this.#move(event));
  }

  /** Begin anew, after a prompt. */
  clear(prompt) {
    this.prompt = prompt;
    this.promptIds = [];
    this.newIds = []; // may be ahead of `tokens`, whose text is held back until it is certain
    this.promptTexts = null;
    this.tokens = [];
    this.characters = [];
    this.weights = null;
    this.chosen = -1;
    this.follows = true; // the end stays in sight until one scrolls away
    this.top = 0;
    this.#draw();
  }

  /** The continuation. */
  get generated() {
    return this.characters.join("");
  }

  /** Ids of all tokens, the prompt's too. */
  get ids() {
    return [...this.promptIds, ...this.newIds.slice(0, this.tokens.length)];
  }

  /** Tokens of the prompt that have a span each; they have none before attention is looked at. */
  get promptCount() {
    return this.promptTexts?.length ?? 0;
  }

  /** Add what a chunk of a stream brought. */
  append({ text, logprobs, token_ids: ids, prompt_token_ids: promptIds }) {
    if (promptIds) this.promptIds = promptIds;
    this.newIds.push(...(ids ?? []));
    this.characters.push(...text);
    const first = Math.max(0, this.tokens.length - 1); // its text may have grown
    logprobs?.tokens.forEach((token, place) => this.tokens.push({
      id: this.newIds[this.tokens.length],
      token,
      offset: logprobs.text_offset[place],
      logprob: logprobs.token_logprobs[place],
      top: Object.entries(logprobs.top_logprobs?.[place] ?? {}).sort((a, b) => b[1] - a[1]),
    }));
    for (let place = first; place < this.tokens.length; place++) this.#drawToken(place);
    if (this.follows) this.#follow();
  }

  /** Show attention: a row of weights for each of the newest tokens, and all tokens' texts. */
  set attention({ tokens, weights }) {
    this.weights = weights;
    if (this.promptTexts === null) {
      this.promptTexts = tokens.slice(0, this.promptIds.length);
      if (this.chosen >= 0) this.chosen += this.promptCount;
      this.#draw();
    }
    this.color();
  }

  /** The text before a token and a token's, where another is to be taken in its place. */
  before(place) {
    const end = this.#range(place - this.promptCount)[0];
    return this.prompt + this.characters.slice(0, end).join("");
  }

  /** The generated token of a span, or undefined. */
  tokenAt(place) {
    return this.tokens[place - this.promptCount];
  }

  /** Choose the token whose attention is shown; -1 chooses none. */
  choose(place) {
    this.spans[this.chosen]?.setAttribute("aria-selected", "false");
    this.chosen = place;
    this.spans[place]?.setAttribute("aria-selected", "true");
    if (place >= 0) this.#enter(place);
    this.color();
    this.onChoice(place);
  }

  /** Give each token its color. */
  color() {
    const row = this.coloring === "attention" ? this.#row() : null;
    // The first token takes what a head has no use for, often most of it: the scale leaves it out.
    const most = row && Math.max(...(row.length > 1 ? row.slice(1) : row), 1e-4);
    this.root.dataset.coloring = this.coloring;
    this.spans.forEach((span, place) => {
      let depth = 0;
      if (row) depth = Math.min(1, (row[place] ?? 0) / most);
      else if (this.coloring === "probability") depth = surprise(this.tokenAt(place));
      span.style.setProperty("--depth", depth.toFixed(3));
    });
  }

  /** The weights of the chosen token, or of the last one. */
  #row() {
    if (!this.weights) return null;
    const place = this.chosen >= 0 ? this.chosen : this.spans.length - 1;
    return this.weights[this.weights.length - this.ids.length + place] ?? null;
  }

  #draw() {
    const prompt = this.promptTexts?.map((text) => span(text, "prompt"));
    this.spans = prompt ?? [];
    const attributes = { role: "none" };
    const whole = element("span", { className: "prompt", attributes }, this.prompt);
    this.root.replaceChildren(...(prompt ?? [whole]));
    this.tokens.forEach((_, place) => this.#drawToken(place));
    this.choose(this.chosen);
  }

  #drawToken(place) {
    const at = place + this.promptCount;
    const text = this.characters.slice(...this.#range(place)).join("");
    if (!this.spans[at]) {
      this.spans[at] = span("", "token");
      const depth = this.coloring === "probability" ? surprise(this.tokens[place]) : 0;
      this.spans[at].style.setProperty("--depth", depth.toFixed(3));
      this.root.append(this.spans[at]);
      if (at === 0) this.spans[at].tabIndex = 0;
    }
    write(this.spans[at], text);
  }

  /** Where a token's characters begin and end: a character of several tokens is the last one's. */
  #range(place) {
    const origin = this.tokens[0]?.offset ?? 0;
    const next = this.tokens[place + 1];
    return [this.tokens[place].offset - origin, next ? next.offset - origin : undefined];
  }

  /** Scroll to the end, once a frame: asking for heights lays the whole text out. */
  #follow() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => {
      if (!this.follows) return;
      this.root.scrollTop = this.root.scrollHeight;
      this.top = this.root.scrollTop; // the event of this comes later, maybe merged with another
    });
  }

  #move(event) {
    const now = this.spans.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const ends = { Home: 0, End: this.spans.length - 1 };
    if (event.key === "Enter" || event.key === " ") this.choose(now);
    else if (event.key in ends) this.#enter(ends[event.key]);
    else if (step) this.#enter(this.#neighbor(now, step));
    else return;
    event.preventDefault();
  }

  /** The next token that has text, in a direction. */
  #neighbor(now, step) {
    let next = now + step;
    while (this.spans[next] && !this.spans[next].textContent) next += step;
    return this.spans[next] ? next : now;
  }

  /** Move the focus, and the one place at which the Tab key enters the text. */
  #enter(place) {
    for (const span of this.spans) span.tabIndex = -1;
    this.spans[place].tabIndex = 0;
    this.spans[place].focus();
  }

  #look(target) {
    const place = this.spans.indexOf(target);
    const facts = place < 0 ? [] : this.#facts(place);
    this.tip.hidden = !facts.length;
    if (!facts.length) return;
    this.tip.replaceChildren(...facts);
    target.setAttribute("aria-describedby", this.tip.id);
    const card = this.tip.offsetParent.getBoundingClientRect();
    const box = target.getClientRects()[0];
    const room = card.width - this.tip.offsetWidth - 8;
    this.tip.style.left = `${Math.max(8, Math.min(box.left - card.left, room))}px`;
    const height = this.tip.offsetHeight + 6;
    const isAbove = box.bottom + height > window.innerHeight && box.top > height;
    this.tip.style.top = `${isAbove ? box.top - card.top - height : box.bottom - card.top + 6}px`;
  }

  #facts(place) {
    const token = this.tokenAt(place);
    const weight = this.coloring === "attention" ? this.#row()?.[place] : undefined; // none after it
    const facts = [];
    if (weight !== undefined) facts.push(element("p", {}, `looked at with ${percent(weight)}`));
    if (token) facts.push(...alternatives(token));
    return facts;
  }
}

/** A token, and the likeliest ones in its place, as bars. */
export function alternatives(token, action = null) {
  const isAmong = token.top.some(([text]) => text === token.token);
  const shown = isAmong ? token.top : [[token.token, token.logprob], ...token.top];
  return shown.map(([text, logprob]) => {
    const share = Math.exp(logprob);
    const bar = element("i");
    bar.style.setProperty("--share", share.toFixed(4));
    const line = [element("code", {}, visible(text)), bar, element("span", {}, percent(share))];
    const className = `alternative${text === token.token ? " taken" : ""}`;
    if (!action) return element("div", { className }, ...line);
    const title = "Continue with this token in its place";
    return element("button", { className, title, type: "button", onclick: () => action(text) }, ...line);
  });
}

function span(text, className) {
  const attributes = { role: "option", "aria-selected": "false" };
  const made = element("span", { className, tabIndex: -1, attributes });
  write(made, text);
  return made;
}

function write(span, text) {
  span.textContent = text;
  span.classList.toggle("newline", /^\n+$/.test(text));
  span.ariaLabel = text.trim() ? null : visible(text);
}

/** How unlikely a token was, from 0 (certain) to 1 (one in a thousand or less). */
function surprise(token) {
  if (typeof token?.logprob !== "number") return 0;
  return Math.min(1, -token.logprob / Math.log(1000));
}
