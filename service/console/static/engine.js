// One engine: its predictions by cycle, the sensors that deviate, and forms for failures and inspections.

import { h, refill, say, table, dash, facts, moment, number, percent, plural, signed, span, empty } from "./page.js";
import { get, live, model, now, post } from "./service.js";
import { badge, colour, faded } from "./health.js";
import { Chart } from "./charts.js";

const SECONDS = 4;
const SYMBOLS = ["circle", "triangle-up", "hexagon2"];

export async function open(main, id, { signal, beat, tell }) {
  const page = new Engine(main, id, signal);
  window.addEventListener("themechange", () => page.again(), { signal });
  page.look = live(SECONDS, signal, async () => {
    try {
      await page.load();
    } catch (error) {
      if (error.code !== "record_not_found") throw error;
      page.unknown();
    }
    beat("live", "live");
  }, tell);
  await page.look();
}

const left = (prediction) => Number.isFinite(prediction.rul); // false for a model without RUL

class Engine {
  constructor(main, id, signal) {
    Object.assign(this, { main, id, signal, picked: null });
    this.crumb = h("a", { class: "crumb", href: "#/fleet", text: "Fleet" });
    this.title = h("div", { class: "title" }, h("h1", { text: id }));
    this.about = h("p");
    main.append(h("div", { class: "head" }, h("div", {}, this.crumb, this.title, this.about)));
  }

  async load() {
    this.model ??= await model(this.signal);
    const found = await get(`v1/engines/${encodeURIComponent(this.id)}?sensors=true`, this.signal);
    const mark = JSON.stringify([found.failed_at_cycle, found.history.map((one) => [one.prediction_id, one.label, one.source])]);
    this.found = found;
    this.rows = found.history;
    this.last = this.rows.at(-1);
    this.ages();
    if (mark === this.mark) return;
    this.mark = mark;
    if (!this.last) return this.unknown();
    if (!this.body) this.frame();
    this.renew();
  }

  unknown() {
    if (this.body || this.missing) return;
    this.main.append(this.missing = empty("This engine is not stored", `No flight and no prediction of “${this.id}” is stored. Check the name; it is case-sensitive.`, h("a", { class: "button", href: "#/fleet", text: "Show the fleet" })));
  }

  frame() {
    this.missing?.remove();
    const classes = this.model.classes;
    this.facts = h("section", { class: "card" });
    this.probabilities = new Chart("Class probabilities of each cycle, stacked", 280);
    this.rul = new Chart("Cycles left, predicted at each cycle", 280);
    this.sets = new Chart("Possible classes at each cycle, and the label", 76 + 34 * classes.length);
    this.away = new Chart("Deviation of a sensor from its baseline, by cycle", 380);
    this.sensors = h("div");
    this.forms = h("section", { class: "card half" }, h("h2", { text: "Report a failure or an inspection" }), this.outcome(), this.inspection());
    this.table = h("details", { class: "behind", on: { toggle: () => this.history() } }, h("summary", { text: "All predictions, as a table" }), this.every = h("div"));
    const rul = left(this.last);
    const sensors = Boolean(this.found.sensors);
    this.body = h("div", { class: "grid" }, this.facts,
      h("section", { class: rul ? "card half" : "card" }, h("h2", { text: "Health" }), h("p", { text: "Probability of each class; their sum is 1." }), this.probabilities.element),
      rul ? h("section", { class: "card half" }, h("h2", { text: "Cycles left" }), h("p", { text: "Predicted remaining useful life; dashed lines separate the classes." }), this.rul.element) : null,
      sensors ? h("section", { class: "card half" }, h("h2", { text: "Sensors with the largest deviation" }),
        h("p", { text: "Mean of the last ten flights minus the baseline at the same altitude and speed, in standard deviations of the training fleet." }), this.sensors) : null,
      sensors ? h("section", { class: "card half" }, this.awayTitle = h("h2", { text: "A sensor over time" }), this.awayAbout = h("p", { text: "" }), this.away.element) : null,
      h("section", { class: "card half" }, h("h2", { text: "Possible classes" }),
        h("p", { text: this.model.conformal ? `The possible classes contain the true class in ${percent(this.model.conformal.level)} of cases. Two classes mean: inspect.` : "This model has no prediction sets; only the label is shown." }), this.sets.element),
      this.forms, h("section", { class: "card" }, this.table));
    this.main.append(this.body);
  }

  ages() {
    if (!this.last) return;
    const ended = this.found.failed_at_cycle;
    say(this.about, `Cycle ${number(this.last.cycle)}, predicted ${span((now() - Date.parse(this.last.made_at)) / 1000)} ago` + (ended === null ? "." : `. Failed at cycle ${number(ended)}.`));
  }

  renew() {
    const { last, rows } = this;
    const classes = this.model.classes;
    this.title.replaceChildren(h("h1", { text: this.id }), badge(last.health, classes));
    const lossy = rows.filter((one) => one.loss !== null);
    const mean = (name) => lossy.reduce((sum, one) => sum + one[name], 0) / lossy.length;
    const worst = classes.at(-1);
    this.facts.replaceChildren(facts([
      [`Probability of ${worst}`, percent(last.probabilities[worst], 1), "", "Probability of the worst class"],
      ...(!left(last) ? [] : [["Cycles left", number(last.rul), "predicted"]]),
      ["Possible classes", last.prediction_set?.join(", ") || dash],
      ["Predictions", number(rows.length), `${number(lossy.length)} with a label`],
      ...(lossy.length ? [["Loss", mean("loss").toFixed(3), `nats; ${mean("expected_loss").toFixed(3)} expected`]] : []),
      ["Temperature", last.temperature.toFixed(3), last.temperature_source],
    ]));
    this.draw();
    if (this.table.open) this.history();
  }

  draw() {
    const { rows } = this;
    const classes = this.model.classes;
    const x = rows.map((one, i) => one.cycle ?? i);
    const p = (name) => rows.map((one) => one.probabilities[name] ?? 0);
    this.probabilities.draw((c) => ({
      traces: classes.map((name, k) => ({ x, y: p(name), name, stackgroup: "one", mode: "lines", line: { width: 0.8, color: colour(k, classes.length, c) }, fillcolor: faded(colour(k, classes.length, c), 0.62), hovertemplate: "%{y:.1%}" })),
      layout: { xaxis: { title: { text: "cycle" } }, yaxis: { range: [0, 1], tickformat: ".0%" } },
    }), () => ({ titles: ["Cycle", ...classes.map((name) => [name, "number", "Probability of a class"])], rows: rows.map((one) => [number(one.cycle), ...classes.map((name) => percent(one.probabilities[name], 1))]) }));
    if (left(this.last)) this.drawRul(x);
    this.drawSets(x);
    if (this.found.sensors) this.drawSensors();
  }

  drawRul(x) {
    const { rows } = this;
    const ended = this.found.failed_at_cycle;
    const truth = ended === null ? null : rows.map((one) => (one.cycle === null ? null : Math.max(0, ended - one.cycle)));
    this.rul.draw((c) => ({
      traces: [{ x, y: rows.map((one) => one.rul), name: "predicted", mode: "lines", line: { color: c.accent, width: 2 }, hovertemplate: "%{y:.0f}" },
        ...(truth ? [{ x, y: truth, name: "observed", mode: "lines", line: { color: c.text, width: 1.4, dash: "dot" }, hovertemplate: "%{y:.0f}" }] : [])],
      layout: { xaxis: { title: { text: "cycle" } }, yaxis: { rangemode: "tozero", title: { text: "cycles left" } },
        shapes: (this.model.rul_thresholds ?? []).map((at, k) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: at, y1: at, line: { dash: "dash", width: 1.2, color: colour(k + 1, this.model.classes.length, c) } })),
        annotations: (this.model.rul_thresholds ?? []).map((at, k) => ({ xref: "paper", x: k ? 0.01 : 1, y: at, xanchor: k ? "left" : "right", yanchor: "bottom", showarrow: false, text: `${this.model.classes[k + 1]} from ${at}`, font: { color: c.muted, size: 11 } })) },
    }), () => ({ titles: ["Cycle", ["Predicted", "number"], ["Observed", "number"]], rows: rows.map((one, i) => [number(one.cycle), number(one.rul, 1), truth ? number(truth[i]) : dash]) }));
  }

  drawSets(x) {
    const { rows } = this;
    const classes = this.model.classes;
    const labelOf = (one) => (one.label === null ? null : typeof one.label === "string" ? one.label : Object.entries(one.label).sort((a, b) => b[1] - a[1])[0][0]);
    this.sets.draw((c) => ({
      traces: [...classes.map((name, k) => {
        const at = rows.flatMap((one, i) => (one.prediction_set?.includes(name) ? [x[i]] : []));
        return { x: at, y: at.map(() => k), name: `${name} possible`, mode: "markers", showlegend: false, marker: { symbol: SYMBOLS[Math.min(2, Math.round((2 * k) / Math.max(1, classes.length - 1)))], size: 8, color: colour(k, classes.length, c) }, hovertemplate: "possible" };
      }), { x: x.filter((_, i) => rows[i].label !== null), y: rows.map(labelOf).filter(Boolean).map((name) => classes.indexOf(name) - 0.3), name: "label", mode: "markers", marker: { symbol: "square", size: 4, color: c.text }, hovertemplate: "label" }],
      layout: { xaxis: { title: { text: "cycle" }, range: [Math.min(...x) - 2, Math.max(...x) + 2] }, yaxis: { tickvals: classes.map((_, k) => k), ticktext: classes, range: [-0.6, classes.length - 0.5], zeroline: false }, hovermode: "closest", showlegend: rows.some((one) => one.label !== null) },
    }), () => ({ titles: ["Cycle", "Possible classes", "Label", "Label source"], rows: rows.map((one) => [number(one.cycle), one.prediction_set?.join(", ") ?? dash, labelOf(one) ?? dash, one.source ?? dash]) }));
  }

  drawSensors() {
    const { cycles, channels } = this.found.sensors;
    if (!cycles.length) {
      this.sensors.replaceChildren(h("p", { class: "note", text: "No flight of this engine is stored, because its predictions came from /v1/predict. Flights sent to /v1/cycles are stored and shown here." }));
      return;
    }
    const described = Object.fromEntries(this.model.channels.map((one) => [one.name, one]));
    const widest = Math.max(1, ...channels.map((one) => Math.abs(one.shift)));
    this.picked ??= channels[0].channel;
    const bar = (moved) => h("div", { class: "sensor-bar", "aria-hidden": "true" }, h("i", { style: { width: `${(50 * Math.abs(moved)) / widest}%`, [moved < 0 ? "right" : "left"]: "50%" } }));
    const rows = channels.slice(0, 7).map((one) => [
      h("div", {}, h("button", { type: "button", class: "pick", "aria-pressed": String(one.channel === this.picked), text: one.channel.replace("sensor_", "sensor "), on: { click: () => this.pick(one.channel) } }),
        h("div", { class: "muted small", text: described[one.channel]?.description ?? "" })), bar(one.shift), signed(one.shift, 2)]);
    refill(this.sensors, table(["Sensor", "Deviation", ["Shift", "number"]], rows, "Sensors with the largest deviation"));
    const of = channels.find((one) => one.channel === this.picked) ?? channels[0];
    const about = described[of.channel];
    say(this.awayTitle, `${of.channel.replace("sensor_", "Sensor ")} over time`);
    say(this.awayAbout, `${about?.description ?? ""}. Standard deviations from the baseline.`.replace(/^\. /, ""));
    const smooth = of.deviations.map((_, i) => { const part = of.deviations.slice(Math.max(0, i - 9), i + 1); return part.reduce((a, b) => a + b, 0) / part.length; });
    this.away.draw((c) => ({
      traces: [{ x: cycles, y: of.deviations, name: "each flight", mode: "markers", marker: { size: 4, color: faded(c.accent, 0.45) }, hovertemplate: "%{y:.2f}" },
        { x: cycles, y: smooth, name: "mean of ten", mode: "lines", line: { color: c.accent, width: 2 }, hovertemplate: "%{y:.2f}" }],
      layout: { xaxis: { title: { text: "cycle" } }, yaxis: { title: { text: "deviations" }, zeroline: true, zerolinecolor: c["line-strong"] } },
    }), () => ({ titles: ["Cycle", ["Deviations", "number"], ["Mean of ten", "number"]], rows: cycles.map((cycle, i) => [number(cycle), signed(of.deviations[i], 2), signed(smooth[i], 2)]) }));
  }

  pick(channel) {
    this.picked = channel;
    this.drawSensors();
  }

  again() {
    for (const chart of [this.probabilities, this.rul, this.sets, this.away]) chart?.again();
  }

  outcome() {
    const field = h("input", { class: "field", type: "number", min: 0, step: 1, required: true, value: this.found.failed_at_cycle ?? this.last.cycle ?? "" });
    const status = h("div", { role: "status" });
    const send = async (revise) => {
      status.replaceChildren();
      const cycle = Number(field.value);
      try {
        const done = await post("v1/outcomes", { engine_id: this.id, failed_at_cycle: cycle, revise });
        const how = { joined: "Recorded", pending: "Recorded", unchanged: "Already stored", revised: "Replaced" }[done.result];
        status.append(h("p", { class: "note", text: `${how}: failed at cycle ${number(cycle)}. ${plural(done.labelled, "prediction")} got a label.` }));
        this.look();
      } catch (error) {
        const known = error.body?.results?.[0]?.known;
        status.append(h("p", { class: "note bad" }, known === undefined ? `Not recorded: ${error.message}.` : `Not recorded: this engine is stored as failed at cycle ${number(known)}. `,
          known === undefined ? null : h("button", { type: "button", class: "button", text: `Replace ${known} by ${cycle}`, on: { click: () => send(true) } })));
      }
    };
    return h("form", { class: "stack", on: { submit: (event) => { event.preventDefault(); send(false); } } },
      h("p", { class: "muted small", text: "The cycle of the failure gives every prediction of this engine its label." }),
      h("div", { class: "inline" }, h("label", {}, "Failed at cycle", field), h("button", { class: "button first", type: "submit", text: "Record the failure" })), status);
  }

  inspection() {
    const cycle = h("input", { class: "field", type: "number", min: 0, step: 1, required: true, value: this.last.cycle ?? "" });
    const found = h("select", { class: "field" }, this.model.classes.map((name) => h("option", { text: name })));
    found.value = this.last.health;
    const status = h("div", { role: "status" });
    const send = async (revise) => {
      status.replaceChildren();
      const label = { engine_id: this.id, cycle: Number(cycle.value), label: found.value, revise };
      try {
        const { result } = (await post("v1/labels", { labels: [label] })).results[0];
        const how = { joined: "Recorded.", pending: "Stored until that cycle is predicted.", unchanged: "Already stored.", revised: "Replaced." }[result];
        status.append(h("p", { class: "note", text: how ?? result }));
        this.look();
      } catch (error) {
        const known = error.body?.results?.[0]?.known;
        status.append(h("p", { class: "note bad" }, known === undefined ? `Not recorded: ${error.message}.` : `Not recorded: the stored label of this cycle is ${typeof known === "string" ? known : "another one"}. `,
          known === undefined ? null : h("button", { type: "button", class: "button", text: `Replace by ${found.value}`, on: { click: () => send(true) } })));
      }
    };
    return h("form", { class: "stack", style: { "margin-top": "20px" }, on: { submit: (event) => { event.preventDefault(); send(false); } } },
      h("p", { class: "muted small", text: "Or report an inspection. Its label takes precedence over the label that follows from the failure." }),
      h("div", { class: "inline" }, h("label", {}, "At cycle", cycle), h("label", {}, "Inspected class", found), h("button", { class: "button", type: "submit", text: "Record the inspection" })), status);
  }

  history() {
    if (!this.table.open) return;
    const classes = this.model.classes;
    const rows = [...this.rows].reverse().map((one) => [number(one.cycle), moment(one.made_at), one.health, percent(one.probabilities[classes.at(-1)], 1), number(one.rul, 1), one.prediction_set?.join(", ") ?? dash,
      typeof one.label === "string" ? one.label : one.label ? "soft" : dash, one.source ?? dash, one.loss === null ? dash : one.loss.toFixed(3), one.expected_loss.toFixed(3)]);
    const shown = table(["Cycle", "Predicted at", "Health", [classes.at(-1), "number", "Probability of a class"], ["Cycles left", "number"], "Possible classes", "Label", "Label source", ["Loss", "number"], ["Expected", "number"]], rows, "All predictions of this engine, newest first");
    refill(this.every, shown);
  }
}
