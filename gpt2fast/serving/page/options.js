// Controls of a request's options. Names, limits, defaults and explanations are those of the
// server's OpenAPI description: an option that the server has has a control here.

import { element } from "./elements.js";

/** Options that stand first; all others follow under "More". */
const GROUPS = {
  Sampling: ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"],
  Penalties: ["repetition_penalty", "frequency_penalty", "presence_penalty"],
};

/** Fields that the page itself sets, or that make no sense for one text on a page. */
const OTHERS = new Set([
  "model", "prompt", "stream", "stream_options", "logprobs", "echo", "n", "best_of", "user",
  "metadata", "return_token_ids", "response_format",
]);

/** Values that the page begins with where a client's own would be another. */
const PRESETS = { max_tokens: "100" };

/** The part of a range that is of use, which a slider covers; a number can be typed beyond it. */
const USEFUL = { temperature: [0, 2], top_k: [0, 100], repetition_penalty: [1, 2], max_tokens: [1, 400] };

/** Ways to constrain a text: what to send for what was typed. */
const CONSTRAINTS = {
  "JSON schema": (text) => ({
    response_format: { type: "json_schema", json_schema: { name: "page", schema: parsed(text) } },
  }),
  "regular expression": (text) => ({ response_format: { type: "regex", regex: text } }),
  "one of these lines": (text) => ({ response_format: { type: "choice", choices: lines(text) } }),
  "Lark grammar": (text) => ({ response_format: { type: "lark", lark: text } }),
};

/** All controls of a request. */
export class Options {
  /**
   * @param {HTMLElement} root takes the controls.
   * @param {object} api the OpenAPI description.
   */
  constructor(root, api) {
    const properties = fieldsOf(api, "/v1/completions");
    const names = Object.keys(properties).filter((name) => !OTHERS.has(name) && takesAny(properties[name]));
    /** Alternatives that may be asked for. */
    this.mostAlternatives = resolved(api, properties.logprobs).maximum ?? Infinity;
    const grouped = new Set(Object.values(GROUPS).flat());
    const groups = { ...GROUPS, More: names.filter((name) => !grouped.has(name)) };
    this.controls = new Map();
    root.replaceChildren();
    for (const [title, members] of Object.entries(groups)) {
      const here = members.filter((name) => names.includes(name));
      if (!here.length) continue;
      const group = element("fieldset", {}, element("legend", {}, title));
      for (const name of here) {
        const control = new Control(name, resolved(api, properties[name]), api);
        this.controls.set(name, control);
        group.append(control.root);
      }
      root.append(group);
    }
    if (properties.response_format) root.append(this.#constraint());
  }

  #constraint() {
    const kinds = ["", ...Object.keys(CONSTRAINTS)];
    const choices = kinds.map((kind) => element("option", { value: kind }, kind || "nothing"));
    this.kind = element("select", { id: "constraint" }, ...choices);
    this.form = element("textarea", {
      id: "constraint-text", rows: 4, spellcheck: false, hidden: true,
      attributes: { "aria-label": "The constraint" },
    });
    this.kind.addEventListener("input", () => (this.form.hidden = !this.kind.value));
    const label = element("label", { htmlFor: "constraint" }, "The text has to match");
    const control = element("div", { className: "control" }, label, this.kind, this.form);
    return element("fieldset", {}, element("legend", {}, "Constraint"), control);
  }

  /** Fields of a request: the options that differ from the server's defaults. */
  get fields() {
    const given = [...this.controls.values()].filter((control) => control.isChanged || control.isPreset);
    const fields = Object.fromEntries(given.map((control) => [control.name, control.value]));
    return { ...fields, ...(this.kind?.value ? CONSTRAINTS[this.kind.value](this.form.value) : {}) };
  }

  /** What a link keeps of these controls: texts by name. */
  get state() {
    const given = [...this.controls.values()].filter((control) => control.isChanged);
    const state = Object.fromEntries(given.map((control) => [control.name, control.text]));
    if (this.kind?.value) Object.assign(state, { constraint: this.kind.value, form: this.form.value });
    return state;
  }

  set state(state) {
    for (const control of this.controls.values()) control.text = state[control.name];
    if (!this.kind) return;
    this.kind.value = state.constraint in CONSTRAINTS ? state.constraint : "";
    this.form.value = state.form ?? "";
    this.form.hidden = !this.kind.value;
  }

  /** The first control whose content is no value that it takes, as an error of the server. */
  get problem() {
    for (const { name, input } of this.controls.values()) {
      const message = input.validationMessage; // of a number that is none, or out of range
      if (message) return { message: `${name}: ${message}`, param: name };
    }
    return null;
  }

  /** Mark the control that an error names, if there is one; null marks none. */
  blame(param) {
    for (const control of this.controls.values()) control.isWrong = control.name === param;
    return this.controls.get(param)?.input;
  }
}

/** One option: a label, one or two inputs, its limits, its default and its explanation. */
class Control {
  constructor(name, schema, api) {
    this.name = name;
    this.kind = kindOf(schema, api);
    this.isPreset = name in PRESETS;
    const own = this.kind.type === "boolean" ? String(schema.default ?? false) : asText(schema.default);
    this.default = PRESETS[name] ?? own;
    const id = `option-${name}`;
    this.input = inputOf(this.kind, this.default);
    Object.assign(this.input, { id, name });
    this.input.setAttribute("aria-describedby", `${id}-hint`);
    const label = element("label", { htmlFor: id }, name.replaceAll("_", " "));
    const hint = element("p", { id: `${id}-hint`, className: "hint" }, ...this.#hint(schema));
    this.root = element("div", { className: `control ${this.kind.type}` }, label, this.input);
    this.#addSlider();
    this.root.append(hint);
    this.input.addEventListener("input", () => this.#show());
  }

  #addSlider() {
    const [low, high] = USEFUL[this.name] ?? [this.kind.low, this.kind.high];
    if (this.kind.type !== "number" || low === undefined || high === undefined) return;
    const step = this.kind.whole ? 1 : (high - low) / 200;
    this.slider = element("input", {
      type: "range", min: low, max: high, step, tabIndex: -1, attributes: { "aria-hidden": "true" },
    });
    this.slider.addEventListener("input", () => {
      this.input.value = this.slider.value;
      this.#show();
    });
    this.root.append(this.slider);
    this.#show();
  }

  #show() {
    if (this.slider) this.slider.value = this.text || this.default || 0;
    this.slider?.classList.toggle("unset", !this.text);
    this.root.classList.toggle("changed", this.isChanged);
    this.isWrong = false;
  }

  /** Limits and default, then the explanation. */
  #hint(schema) {
    const { type, low, high, above, below } = this.kind;
    const limits = [];
    if (low !== undefined) limits.push(above ? `above ${low}` : `from ${low}`);
    if (high !== undefined) limits.push(below ? `to below ${high}` : `to ${high}`);
    const forms = {
      texts: "one a line, \\n for a new line", numbers: "separated by commas", object: "as JSON",
    };
    const preset = this.isPreset ? `${this.default} on this page` : `default ${this.default || "none"}`;
    const facts = [limits.join(" ") || forms[type], type === "boolean" ? "" : preset];
    const about = element("span", { className: "limits" }, facts.filter(Boolean).join(" · "));
    return [about, schema.description ?? ""];
  }

  get isChanged() {
    return this.text !== this.default && this.text !== "";
  }

  /** What stands in the control; a half-typed number is no text for a browser, so "". */
  get text() {
    return this.kind.type === "boolean" ? String(this.input.checked) : this.input.value;
  }

  set text(text) {
    if (this.kind.type === "boolean") this.input.checked = (text ?? this.default) === "true";
    else this.input.value = text ?? this.default;
    this.#show();
  }

  /** What is sent. Text that cannot be read is sent as it is: the server says what is wrong. */
  get value() {
    const { type } = this.kind;
    if (type === "boolean") return this.input.checked;
    if (type === "number") return Number(this.text);
    if (type === "texts") return lines(this.text).map(unescaped);
    if (type === "numbers") return this.text.split(/[\s,]+/).filter(Boolean).map(Number);
    return type === "object" ? parsed(this.text) : this.text;
  }

  set isWrong(wrong) {
    this.input.setAttribute("aria-invalid", String(wrong));
  }
}

function inputOf(kind, value) {
  if (kind.type === "boolean") return element("input", { type: "checkbox", checked: value === "true" });
  if (kind.type === "choice") {
    const choices = kind.values.map((choice) => element("option", { value: choice }, choice || "default"));
    return element("select", {}, ...choices);
  }
  if (kind.type === "texts") return element("textarea", { rows: 2, value, spellcheck: false });
  const plain = { value, placeholder: "default", autocomplete: "off", spellcheck: false };
  if (kind.type !== "number") return element("input", { type: "text", ...plain });
  return element("input", {
    type: "number", step: kind.whole ? 1 : "any", min: kind.low ?? "", max: kind.high ?? "", ...plain,
  });
}

/** What an option takes: its type on this page, and its limits. */
function kindOf(schema, api) {
  const branches = (schema.anyOf ?? schema.oneOf ?? [schema]).map((branch) => resolved(api, branch));
  const of = (type) => branches.find((branch) => [branch.type].flat().includes(type));
  const list = of("array");
  const number = of("integer") ?? of("number");
  if (list) return { type: resolved(api, list.items ?? {}).type === "string" ? "texts" : "numbers" };
  if (number) {
    const low = number.minimum ?? number.exclusiveMinimum;
    const high = number.maximum ?? number.exclusiveMaximum;
    const huge = (limit) => (Math.abs(limit) > 1e9 ? undefined : limit);
    return {
      type: "number", whole: number === of("integer"), low: huge(low), high: huge(high),
      above: number.minimum === undefined, below: number.maximum === undefined,
    };
  }
  if (of("boolean")) return { type: "boolean" };
  const values = branches.find((branch) => branch.enum)?.enum;
  if (values) return { type: "choice", values: ["", ...values.filter(Boolean)] };
  return { type: of("object") ? "object" : "text" };
}

/** What a schema that may be a reference stands for. */
export function resolved(api, schema) {
  if (!schema.$ref) return schema;
  const { $ref, ...rest } = schema;
  const found = $ref.slice(2).split("/").reduce((node, key) => node[key], api);
  return { ...resolved(api, found), ...rest };
}

/** The fields of the body of a request. */
export function fieldsOf(api, path) {
  const { schema } = api.paths[path].post.requestBody.content["application/json"];
  return resolved(api, schema).properties;
}

/** False for fields of the protocol that the server only knows to refuse them. */
const takesAny = (schema) => Boolean(schema.type ?? schema.anyOf ?? schema.oneOf ?? schema.$ref);

function asText(value) {
  if (value === null || value === undefined) return "";
  return typeof value === "object" ? "" : String(value);
}

const lines = (text) => text.split("\n").filter(Boolean);

const unescaped = (text) => text.replace(/\\([nt\\])/g, (_, c) => ({ n: "\n", t: "\t", "\\": "\\" })[c]);

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
