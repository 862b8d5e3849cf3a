// Explains softmax and cross-entropy: logits on sliders, with every step of the arithmetic, checked by the service.

import { h, say, table, number } from "./page.js";
import { get, model, post } from "./service.js";
import { Chart } from "./charts.js";
import { term } from "./tooltip.js";
import { naive, softmax, worked } from "./numerics.js";

const FEWEST = 2;
const MOST = 10;
const REACH = 10; // of a slider; more if a logit is larger
const [COLDEST, HOTTEST] = [0.01, 100]; // temperatures that the service accepts
const MOST_LOGIT = 1e6; // far beyond it, z / temperature is not finite
const within = (logit) => Math.min(MOST_LOGIT, Math.max(-MOST_LOGIT, logit));
const PRESETS = {
  "Confident and correct": () => ({ logits: [6, 1, 0, -1], y: 0 }),
  "Confident and wrong": () => ({ logits: [6, 1, 0, -1], y: 3 }),
  Uniform: () => ({ logits: [0, 0, 0, 0], y: 0 }),
  "Overflow: logits 1000": () => ({ logits: [1000, 999, 998, 0], y: 1 }),
  "Softmax applied twice": (now) => ({ logits: softmax(now), y: null, why: "twice" }),
};

export async function open(main, _, { signal, query, remember, beat }) {
  const page = new Explorer(main, signal, query, remember, beat);
  window.addEventListener("themechange", () => page.curve.again(), { signal });
  page.show();
  await page.names().catch(() => {}); // without a store or a key there are no engines to load
}

const plain = (value) => (Math.abs(value) >= 1e6 || (value !== 0 && Math.abs(value) < 1e-4) ? value.toExponential(4) : String(Number(value.toFixed(6))));

class Explorer {
  constructor(main, signal, query, remember, beat) {
    Object.assign(this, { signal, remember, beat, classes: [], why: null });
    const given = (query.get("z") ?? "").split(",").map(Number);
    const usable = given.length >= FEWEST && given.length <= MOST && given.every(Number.isFinite) && query.get("z");
    this.logits = usable ? given.map(within) : [2, 1, 0.1, -1];
    this.y = Math.min(this.logits.length - 1, Math.max(0, Math.trunc(Number(query.get("y")) || 0)));
    this.temperature = Math.min(HOTTEST, Math.max(COLDEST, Number(query.get("t")) || 1));
    this.build(main);
  }

  build(main) {
    this.count = h("input", { class: "field", type: "number", min: FEWEST, max: MOST, on: { change: () => this.resize(Number(this.count.value)) } });
    this.rows = h("div", { class: "logits" });
    this.hot = h("input", { class: "wide", type: "range", min: -2, max: 2, step: 0.01, "aria-label": "Temperature, from sharp to flat", on: { input: () => this.heat(10 ** Number(this.hot.value)) } });
    this.exact = h("input", { class: "field", type: "number", min: COLDEST, max: HOTTEST, step: "any", "aria-label": "Temperature", on: { change: () => this.heat(this.exact.value === "" ? 1 : Number(this.exact.value)) } });
    this.engine = h("input", { class: "field", list: "engines", placeholder: "Engine", "aria-label": "Engine whose newest prediction to load" });
    this.list = h("datalist", { id: "engines" });
    this.loaded = h("p", { class: "muted small", role: "status" });
    this.answers = h("div", { class: "answers" });
    this.loss = h("span", { class: "loss" });
    this.sum = h("div", { class: "worked scroll", tabindex: 0, role: "region", "aria-label": "The calculation" });
    this.steps = h("div");
    this.warning = h("p", { class: "note bad", hidden: true });
    this.check = h("p", { class: "muted small", role: "status" });
    this.curve = new Chart("Loss against the probability of the true class, with the point where this one is", 240);
    const presets = Object.entries(PRESETS).map(([text, make]) => h("button", { type: "button", class: "button", text, on: { click: () => this.preset(make(this.logits)) } }));
    main.append(h("div", { class: "head" }, h("div", {}, h("h1", { text: "Explorer" }), h("p", { text: "How logits become probabilities, and what a wrong prediction costs. Nothing on this page is stored." }))),
      h("div", { class: "grid" },
        h("section", { class: "card half stack" }, h("h2", { text: "Logits" }), h("div", { class: "presets" }, presets),
          h("p", { class: "muted small", text: "Select the true class with its radio button." }), this.rows,
          h("div", { class: "inline" }, h("label", {}, "Classes", this.count),
            h("label", { style: { flex: "1 1 160px" } }, "Temperature: sharp to flat", this.hot), h("label", {}, h("span", { class: "hidden", text: "Temperature" }), this.exact)),
          h("form", { class: "inline", on: { submit: (event) => { event.preventDefault(); this.load(); } } }, h("label", {}, "Load from a prediction", this.engine), this.list, h("button", { class: "button", type: "submit", text: "Load" })), this.loaded),
        h("section", { class: "card half stack" }, h("h2", { text: "Probabilities" }), this.answers, this.warning,
          h("div", { class: "cost" }, h("div", {}, h("p", { class: "muted small" }, term("Loss, -ln p of the true class", "Loss of the true class")), this.loss, h("p", { class: "muted small", text: "nats" }), this.check), this.curve.element)),
        h("section", { class: "card stack" }, h("h2", { text: "The calculation" }), this.sum, this.steps)));
    this.lines();
  }

  name(k) {
    return this.classes[k] ?? `class ${k}`;
  }

  /** Create the controls; again when the number of classes changes. */
  lines() {
    this.controls = this.logits.map((_, k) => {
      const slider = h("input", { type: "range", step: 0.01, "aria-label": `Logit of ${this.name(k)}`, on: { input: () => this.move(k, Number(slider.value)) } });
      const exact = h("input", { class: "field", type: "number", step: "any", "aria-label": `Logit of ${this.name(k)}, as a number`, on: { change: () => this.move(k, Number(exact.value)) } });
      const truth = h("input", { type: "radio", name: "truth", "aria-label": `${this.name(k)} is true`, on: { change: () => { this.y = k; this.show(); } } });
      return { slider, exact, truth, row: h("div", { class: "logit" }, truth, h("span", { class: "name", text: this.name(k), title: this.name(k) }), slider, exact) };
    });
    this.rows.replaceChildren(...this.controls.map((one) => one.row));
    this.bars = this.logits.map((_, k) => {
      const fill = h("i");
      const value = h("span", { class: "number" });
      return { fill, value, row: h("div", { class: "answer" }, h("span", { class: "name", text: this.name(k) }), h("div", { class: "bar", "aria-hidden": "true" }, fill), value) };
    });
    this.answers.replaceChildren(...this.bars.map((one) => one.row));
  }

  move(k, value) {
    this.logits[k] = within(Number.isFinite(value) ? value : 0);
    this.why = null;
    this.show();
  }

  heat(value) {
    this.temperature = Math.min(HOTTEST, Math.max(COLDEST, value));
    this.show();
  }

  resize(n) {
    const wanted = Math.min(MOST, Math.max(FEWEST, Math.trunc(n) || FEWEST));
    this.logits = Array.from({ length: wanted }, (_, k) => this.logits[k] ?? 0);
    this.y = Math.min(this.y, wanted - 1);
    this.classes = [];
    this.lines();
    this.show();
  }

  preset({ logits, y, why = null }) {
    this.logits = [...logits];
    this.y = y ?? this.y;
    this.why = why;
    if (why !== "twice") this.classes = [];
    this.temperature = 1;
    say(this.loaded, "");
    this.lines();
    this.show();
  }

  show() {
    const found = (this.found = worked(this.logits, this.y, this.temperature));
    this.count.value = this.logits.length;
    this.exact.value = Number(this.temperature.toPrecision(4));
    this.hot.value = Math.log10(this.temperature);
    this.hot.setAttribute("aria-valuetext", String(this.exact.value)); // the slider itself counts powers of ten
    const reach = Math.max(REACH, ...this.logits.map(Math.abs));
    this.controls.forEach(({ slider, exact, truth }, k) => {
      slider.min = -reach;
      slider.max = reach;
      slider.value = this.logits[k];
      exact.value = Number(this.logits[k].toPrecision(7));
      truth.checked = k === this.y;
    });
    this.bars.forEach(({ fill, value, row }, k) => {
      fill.style.setProperty("width", `${(100 * found.p[k]).toFixed(2)}%`);
      say(value, found.p[k].toFixed(6));
      if (k === this.y) row.setAttribute("data-true", "");
      else row.removeAttribute("data-true");
    });
    say(this.loss, found.loss.toFixed(6));
    this.write(found);
    this.draw(found);
    this.remember({ z: this.logits.map((one) => Number(one.toPrecision(7))).join(","), y: this.y, t: Number(this.temperature.toPrecision(6)) });
    this.ask();
  }

  write({ z, max, shifted, exponentials, sum, p, logP, loss, gradient, entropy }) {
    const y = this.y;
    const line = (...parts) => h("div", {}, parts);
    this.sum.replaceChildren(
      line(`z = logits / ${plain(this.temperature)},  max z = `, h("b", { text: plain(max) })),
      line("sum of exp(z - max) = ", exponentials.map(plain).join(" + "), " = ", h("b", { text: plain(sum) })),
      line(`p(${this.name(y)}) = exp(${plain(shifted[y])}) / ${plain(sum)} = `, h("b", { text: plain(p[y]) })),
      line(`loss = -ln p = ln(${plain(sum)}) - (${plain(shifted[y])}) = `, h("b", { text: plain(loss) }), " nats"),
      line(`expected loss, the entropy = ${plain(entropy)} nats`));
    const rows = this.logits.map((logit, k) => ({ props: k === y ? { "data-true": true } : {}, cells: [this.name(k) + (k === y ? " (true)" : ""), plain(logit), plain(z[k]), plain(shifted[k]), plain(exponentials[k]), plain(p[k]), plain(0 - logP[k]), plain(gradient[k])] }));
    const columns = ["logit", "z", "z - max", "exp", "p", "-ln p", "gradient p - y"];
    this.steps.replaceChildren(table(["Class", ...columns.map((one) => [one, "number"])], rows, "Every step, by class"));
    const careless = naive(this.logits, this.temperature);
    const broken = careless.some((one) => Number.isNaN(one));
    this.warning.hidden = !broken && this.why !== "twice";
    if (broken) say(this.warning, `Without subtracting the largest z, exp(${plain(max)}) is infinite, and every probability is infinity divided by infinity. With it, the largest exponential is exp(0) = 1.`);
    else if (this.why === "twice") say(this.warning, "These logits are probabilities: softmax was applied before. A second softmax flattens them towards uniform, and the loss cannot get near 0. The service returns a warning for such rows and changes nothing.");
  }

  draw({ p, loss }) {
    const x = Array.from({ length: 120 }, (_, i) => 0.005 * (200 ** (i / 119)));
    const at = p[this.y];
    this.curve.draw((c) => ({
      traces: [{ x, y: x.map((one) => -Math.log(one)), mode: "lines", name: "-ln p", line: { color: c.accent, width: 2 }, hovertemplate: "p %{x:.3f}: %{y:.3f} nats<extra></extra>" },
        { x: [Math.max(at, 0)], y: [Math.min(loss, 5.6)], mode: "markers", name: "here", marker: { size: 12, color: c.bad, line: { color: c.surface, width: 2 } }, hovertemplate: `p ${plain(at)}: ${plain(loss)} nats<extra></extra>` }],
      layout: { xaxis: { title: { text: "p of the true class" }, range: [-0.03, 1.03] }, yaxis: { title: { text: "nats" }, range: [-0.3, 5.8] }, hovermode: "closest", showlegend: false },
    }), () => ({ titles: [["p", "number"], ["-ln p", "number"]], rows: [[plain(at), plain(loss)], ...[1, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01].map((one) => [one, (0 - Math.log(one)).toFixed(4)])] }));
  }

  /** Compare with the numerics of the service, a moment after the last change. */
  ask() {
    clearTimeout(this.timer);
    this.check.dataset.state = "waiting";
    this.timer = setTimeout(async () => {
      const { found, logits, y, temperature } = this;
      try {
        const result = await post("v1/evaluate", { logits: [logits], labels: [y], temperature });
        if (this.signal.aborted || found !== this.found) return;
        const apart = Math.max(Math.abs(result.losses[0] - found.loss), ...result.probabilities[0].map((one, k) => Math.abs(one - found.p[k])));
        say(this.check, apart <= 1e-6 ? `The numerics of the service agree: the difference is ${apart === 0 ? "0" : apart.toExponential(0)}.` : `The service returns ${result.losses[0]}: this page differs by ${apart.toExponential(1)}.`);
        this.check.dataset.state = apart <= 1e-6 ? "agrees" : "differs";
        this.beat("live", "live");
      } catch (error) {
        if (this.signal.aborted) return;
        say(this.check, `Not checked by the service: ${error.message}`);
        this.check.dataset.state = "unchecked";
        this.beat("down", "not live");
      }
    }, 250);
  }

  async names() {
    const page = await get("v1/engines?limit=200&running=true", this.signal);
    this.list.replaceChildren(...page.engines.map((one) => h("option", { value: one.engine_id })));
    this.engine.placeholder = page.engines[0]?.engine_id ?? "no engine yet";
  }

  async load() {
    const id = this.engine.value.trim() || this.list.firstChild?.value;
    if (!id) return say(this.loaded, "Enter an engine first.");
    try {
      const [{ history }, { classes }] = await Promise.all([get(`v1/engines/${encodeURIComponent(id)}`, this.signal), model(this.signal)]);
      const last = history.at(-1);
      if (!last) return say(this.loaded, `Engine ${id} has no prediction yet.`);
      if (last.logits.length > MOST) return say(this.loaded, `${id} has ${last.logits.length} classes; the limit of this page is ${MOST}.`);
      this.logits = [...last.logits];
      this.classes = classes.length === last.logits.length ? classes : [];
      const truth = typeof last.label === "string" ? last.label : last.health;
      this.y = Math.max(0, classes.indexOf(truth));
      this.temperature = Math.min(HOTTEST, Math.max(COLDEST, last.temperature));
      this.why = null;
      this.lines();
      this.show();
      say(this.loaded, `${id} at cycle ${number(last.cycle)}, temperature ${last.temperature.toFixed(4)}. ${last.label === null ? `No label is known; ${truth} is assumed.` : `The label is ${truth}.`}`);
    } catch (error) {
      if (error.name !== "AbortError") say(this.loaded, error.message);
    }
    return undefined;
  }
}
