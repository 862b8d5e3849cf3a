// Calibration: whether the probabilities can be trusted, in words and charts, and how to correct them.

import { h, refill, table, dash, facts, moment, number, percent, plural, signed, span } from "./page.js";
import { get, live, post, putAsAdmin } from "./service.js";
import { level, shape } from "./health.js";
import { Chart } from "./charts.js";

const SECONDS = 20;
const PERIODS = 24;
const WINDOWS = [["", "all time"], ["90d", "the last 90 days"], ["30d", "the last 30 days"], ["7d", "the last 7 days"], ["24h", "the last 24 hours"], ["1h", "the last hour"]];
const FAR = 0.25; // PSI of a change of the population, as in ops/alerts.yml
const NEAR = 0.1;
const Z = 1.645; // 90 % of a normal distribution are within this number of standard deviations

export async function open(main, _, { signal, query, remember, beat, tell }) {
  const page = new Calibration(main, query, remember, signal);
  window.addEventListener("themechange", () => page.again(), { signal });
  page.look = live(SECONDS, signal, async () => {
    await page.load();
    beat("live", "live");
  }, tell);
  await page.look();
}

class Calibration {
  constructor(main, query, remember, signal) {
    Object.assign(this, { remember, signal });
    this.window = WINDOWS.some(([value]) => value === query.get("window")) ? query.get("window") : "";
    this.windows = h("select", { class: "field", on: { change: () => this.choose() } }, WINDOWS.map(([value, text]) => h("option", { value, text })));
    this.windows.value = this.window;
    this.verdict = h("section", { class: "card verdict", "aria-live": "polite" }, h("p", { text: "Loading …" }));
    this.figures = h("section", { class: "card" });
    this.reliability = new Chart("Accuracy at each confidence", 320);
    this.overTime = new Chart("Loss over time, realised and expected", 320);
    this.classes = h("section", { class: "card" });
    this.labels = h("section", { class: "card" });
    this.drift = h("section", { class: "card half" });
    this.changes = h("div");
    this.status = h("div", { role: "status" });
    this.fit = h("button", { type: "button", class: "button first", text: "Fit a temperature", on: { click: () => this.refit() } });
    this.back = h("button", { type: "button", class: "button", text: "Undo the last change", on: { click: (event) => { if (event.detail < 2) this.change({ rollback: true }, "Undone."); } } });
    this.body = h("div", { class: "grid", hidden: true }, this.figures,
      h("section", { class: "card half" }, h("h2", { text: "Accuracy at each confidence" }),
        h("p", { text: "On the line, accuracy equals confidence. The bars contain 90 % of such bins by chance." }), this.reliability.element),
      h("section", { class: "card half" }, h("h2", { text: "Loss over time" }),
        h("p", { text: "Above the band, the model was overconfident in that time." }), this.overTime.element),
      h("div", { class: "half column" }, this.classes, this.labels, h("section", { class: "card stack" }, h("h2", { text: "Temperature" }),
        h("p", { class: "muted", text: "Divides the logits: above 1 flattens the probabilities, below 1 sharpens them. Their order never changes. A fit is scored on held-out engines, and is active only after you apply it." }),
        this.changes, h("div", { class: "inline" }, this.fit, this.back), this.status)), this.drift);
    main.append(h("div", { class: "head" }, h("div", {}, h("h1", { text: "Calibration" }), h("p", { text: "Whether a confidence of 90 % is correct in nine of ten cases, from the labels received." })),
      h("div", { class: "inline" }, h("label", {}, "Predictions of", this.windows))), h("div", { class: "stack" }, this.verdict, this.body));
  }

  choose() {
    this.window = this.windows.value;
    this.remember(this.window ? { window: this.window } : {});
    this.look();
  }

  async load() {
    const asked = this.window;
    const window = asked ? `&window=${asked}` : "";
    const [found, tempered] = await Promise.all([get(`v1/calibration?periods=${PERIODS}${window}`, this.signal), get("v1/calibration/temperature", this.signal)]);
    if (asked !== this.window) return; // another time was selected in the meantime
    this.found = found;
    this.body.hidden = false;
    this.showVerdict(found);
    this.showFigures(found);
    this.drawReliability(found.reliability);
    this.drawTime(found.over_time);
    this.showClasses(found.classes);
    this.showLabels(found);
    this.showDrift(found.drift);
    this.showTemperature(tempered);
  }

  showVerdict(found) {
    const [of, title, text] = verdict(found);
    if (this.verdict.textContent === title + text) return; // an unchanged text is not read aloud again
    this.verdict.dataset.state = found.state;
    this.verdict.replaceChildren(shape(of), h("div", {}, h("h2", { text: title }), h("p", { text })));
  }

  showFigures({ cross_entropy: loss, ece, accuracy, brier, conformal, n, engines }) {
    this.figures.replaceChildren(facts([
      ["Labels", number(n), `of ${plural(engines, "engine")}`],
      ["Accuracy", percent(accuracy)],
      ["Loss", loss.realised === null ? dash : loss.realised.toFixed(3), loss.expected === null ? "" : `nats; ${loss.expected.toFixed(3)} expected`],
      ["Gap by engine", loss.z_engines === null ? dash : signed(loss.z_engines), "standard errors"],
      ["ECE", ece.value === null ? dash : ece.value.toFixed(3), ece.noise_band ? `chance gives ${ece.noise_band.map((x) => x.toFixed(3)).join(" to ")}` : ""],
      ["Brier", brier === null ? dash : brier.toFixed(3)],
      ...(conformal ? [["Coverage", percent(conformal.coverage), `${percent(conformal.level)} promised; ${conformal.mean_size === null ? dash : conformal.mean_size.toFixed(2)} classes each`]] : []),
    ]));
  }

  drawReliability(bins) {
    const some = bins.filter((bin) => bin.n > 0);
    const half = (bin) => Z * Math.sqrt((bin.confidence * (1 - bin.confidence)) / bin.n);
    const most = Math.max(1, ...some.map((bin) => bin.n));
    this.reliability.draw((c) => ({
      traces: [
        { x: [0, 1], y: [0, 1], mode: "lines", name: "calibrated", line: { color: c["line-strong"], dash: "dot", width: 1.4 }, hoverinfo: "skip" },
        { x: some.map((bin) => bin.confidence), y: some.map((bin) => bin.confidence), mode: "markers", name: "chance", marker: { size: 0.1, color: c.muted }, error_y: { type: "data", array: some.map(half), color: c["line-strong"], thickness: 7, width: 0 }, hoverinfo: "skip" },
        { x: some.map((bin) => bin.confidence), y: some.map((bin) => bin.accuracy), mode: "lines+markers", name: "accuracy", line: { color: c.accent, width: 1.6 }, marker: { color: c.accent, size: some.map((bin) => 6 + 10 * Math.sqrt(bin.n / most)) }, customdata: some.map((bin) => bin.n), hovertemplate: "confidence %{x:.1%}, accuracy %{y:.1%}, %{customdata} predictions<extra></extra>" },
      ],
      layout: { xaxis: { title: { text: "confidence" }, range: [0, 1.02], tickformat: ".0%" }, yaxis: { title: { text: "accuracy" }, range: [0, 1.05], tickformat: ".0%" }, hovermode: "closest" },
    }), () => ({ titles: ["Confidence", ["Predictions", "number"], ["Mean confidence", "number"], ["Accuracy", "number"], ["Chance", "number"]], rows: some.map((bin) => [`${percent(bin.lower)} to ${percent(bin.upper)}`, number(bin.n), percent(bin.confidence, 1), percent(bin.accuracy, 1), `± ${percent(half(bin), 1)}`]) }));
  }

  drawTime(periods) {
    const some = periods.filter((one) => one.n > 0);
    const x = some.map((one) => new Date((Date.parse(one.from) + Date.parse(one.to)) / 2));
    const edge = (sign) => some.map((one) => Math.max(0, one.expected + sign * 2 * one.noise));
    this.overTime.draw((c) => ({
      traces: [
        { x, y: edge(-1), mode: "lines", line: { width: 0 }, showlegend: false, hoverinfo: "skip" },
        { x, y: edge(1), mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: "rgba(128,140,155,.22)", name: "chance, for independent rows", hoverinfo: "skip" },
        { x, y: some.map((one) => one.expected), mode: "lines", name: "expected", line: { color: c.muted, dash: "dash", width: 1.6 }, hovertemplate: "%{y:.3f}" },
        { x, y: some.map((one) => one.realised), mode: "lines+markers", name: "realised", line: { color: c.accent, width: 2 }, marker: { size: 5 }, customdata: some.map((one) => one.n), hovertemplate: "%{y:.3f} of %{customdata}" },
      ],
      layout: { xaxis: { title: { text: "when predicted" }, tickangle: 0, nticks: 5 }, yaxis: { title: { text: "nats" }, rangemode: "tozero" } },
    }), () => ({ titles: ["From", ["Labels", "number"], ["Realised", "number"], ["Expected", "number"], ["Chance", "number"]], rows: some.map((one) => [moment(one.from), number(one.n), one.realised.toFixed(3), one.expected.toFixed(3), `± ${(2 * one.noise).toFixed(3)}`]) }));
  }

  showClasses(classes) {
    const name = (one, k) => h("span", { class: "health" }, shape(level(k, classes.length)), h("span", { text: one.class }));
    refill(this.classes, h("h2", { text: "By class" }), h("p", { text: "Share of each class, predicted and observed, and how well it is recognised." }),
      table(["Class", ["Labels", "number"], ["Share predicted", "number"], ["Share observed", "number"], ["Recall", "number"], ["Precision", "number"], ["ECE", "number"]],
        classes.map((one, k) => [name(one, k), number(one.n), percent(one.mean_predicted), percent(one.mean_observed), percent(one.recall), percent(one.precision), one.ece === null ? dash : one.ece.toFixed(3)]), "By class"));
  }

  showLabels({ labels }) {
    const { lag_seconds: lag, sources } = labels;
    const rows = labels.by_age.filter((band) => band.n > 0).map((band) => [band.to_seconds === null ? `older than ${span(band.from_seconds)}` : `${band.from_seconds ? span(band.from_seconds) : "0"} to ${span(band.to_seconds)}`,
      number(band.n), meter(band.share), percent(band.share)]);
    refill(this.labels, h("h2", { text: "Labels and their delay" }),
      h("p", { text: labels.selection_biased ? "Fewer than four of five predictions have a label. Those with a label may be the difficult ones." : "Enough predictions have a label to represent the fleet." }),
      facts([["Share labelled", percent(labels.share)], ["Median delay", span(lag.p50)], ["90 % delay", span(lag.p90)], ["Labels from failures", number(sources.outcome)], ["from continued operation", number(sources.survival)], ["from inspections", number(sources.inspection)]]),
      rows.length ? table(["Age of the prediction", ["Predictions", "number"], "Share", ["Share labelled", "number"]], rows, "Share labelled by age") : h("p"));
  }

  showDrift(drift) {
    if (!drift) {
      this.drift.replaceChildren(h("h2", { text: "Drift" }), h("p", { text: "This model has no reference for drift." }));
      return;
    }
    const all = [["confidence", drift.confidence], ["entropy", drift.entropy], ...Object.entries(drift.channels)].filter(([, one]) => one && one.psi !== null);
    all.sort((a, b) => b[1].psi - a[1].psi);
    const word = (psi) => (psi >= FAR ? ["bad", "far"] : psi >= NEAR ? ["watch", "shifted"] : ["good", "unchanged"]);
    const rows = all.map(([name, one]) => {
      const [of, text] = word(one.psi - one.noise);
      return [name.replace("sensor_", "sensor ").replace("op_setting_", "setting "), h("span", { class: "health small" }, shape(of), text), meter(Math.min(1, one.psi / (4 * FAR)), of), one.psi.toFixed(3), one.noise.toFixed(3)];
    });
    refill(this.drift, h("h2", { text: "Drift, without labels" }), h("p", { text: "Population stability index against engines held out in training. A fleet of one type differs from the mixed training data without any fault." }),
      rows.length ? table(["Quantity", "State", "Distance", ["PSI", "number"], ["Chance", "number", "PSI by chance"]], rows, "Drift of confidence, entropy and each channel") : h("p", { class: "note", text: "No prediction in this time." }));
  }

  showTemperature({ temperature, temperature_source: source, changes }) {
    const rows = [...changes].reverse().map((one) => [moment(one.changed_at), one.temperature.toFixed(4), one.rollback ? "undone" : one.fit_id ? "fitted" : "set by hand", h("code", { text: one.who })]);
    refill(this.changes, facts([["Active temperature", temperature.toFixed(4), this.origin(source, changes)]]),
      rows.length ? table(["Changed", ["Temperature", "number"], "Source", "Key"], rows, "Every change of the temperature, newest first") : h("p", { class: "muted small", text: "The temperature was never changed." }));
    this.back.disabled = !rows.length || source === "artefact";
  }

  /** Describe where the active temperature comes from. */
  origin(source, changes) {
    if (source === "artefact") return "of the artefact";
    return changes.at(-1)?.fit_id ? "fitted" : "set by hand";
  }

  refit() {
    return this.alone("No fit", async () => {
      this.status.replaceChildren(h("p", { class: "muted", text: "Fitting …" }));
      const fit = await post("v1/calibration/fits", this.window ? { window: this.window } : {});
      const loss = fit.held_out.cross_entropy;
      const apply = h("button", { type: "button", class: "button first", text: `Apply ${fit.temperature.toFixed(4)}`, on: { click: () => this.change({ fit_id: fit.fit_id }, "Applied.") } });
      this.status.replaceChildren(h("div", { class: "note stack" },
        h("p", {}, h("b", { text: `Temperature ${fit.temperature.toFixed(4)}` }), ` fitted to ${plural(fit.n, "label")} of ${plural(fit.engines, "engine")}; active is ${fit.active_temperature.toFixed(4)}.`),
        h("p", { text: `On held-out engines the loss changes from ${loss.before.toFixed(4)} to ${loss.after.toFixed(4)} nats. ${fit.significant ? "The whole interval is a gain." : "This may be chance: the interval includes no gain."}` }),
        apply));
    });
  }

  change(body, done) {
    return this.alone("Nothing was changed", async () => {
      const now = await putAsAdmin("v1/calibration/temperature", body);
      this.status.replaceChildren(h("p", { class: "note", text: `${done} The active temperature is ${now.temperature.toFixed(4)}; every worker follows within 2 s.` }));
      this.look();
    });
  }

  /** Run one change at a time. A fit that could not be applied remains available. */
  async alone(title, work) {
    if (this.changing) return;
    this.changing = true;
    this.status.querySelector(".bad")?.remove();
    try {
      await work();
    } catch (error) {
      this.status.querySelector("p.muted")?.remove();
      this.status.append(h("p", { class: "note bad", text: `${title}: ${error.message}.`.replace("..", ".") }));
    }
    this.changing = false;
  }

  again() {
    this.reliability.again();
    this.overTime.again();
  }
}

function meter(share, of) {
  return h("div", { class: "meter", "data-level": of, "aria-hidden": "true" }, h("i", { style: { width: `${(100 * (share ?? 0)).toFixed(1)}%` } }));
}

/** Return the state in words: level of its shape, title, and what to do. */
export function verdict(found) {
  const { accuracy, engines, classes, evidence } = found;
  const mean = found.label_free.error ? accuracy + found.label_free.error.accuracy : null;
  const both = `confidence ${percent(mean)}, accuracy ${percent(accuracy)}, ${plural(engines, "engine")}`;
  const biased = found.labels.selection_biased ? " Fewer than four of five predictions have a label; those with a label may be the difficult ones." : "";
  const range = found.cross_entropy.interval;
  const surely = found.state === "calibrated" && range && range[0] * range[1] > 0; // but not for repeated looks
  if (surely) {
    const how = range[0] > 0 ? "overconfident" : "underconfident";
    return ["watch", `No alarm: ${both}`, `For these labels the model is ${how}, by more than chance explains in a single look. Evidence that holds for daily looks needs more engines. Wait, or fit a temperature below.${biased}`];
  }
  const off = [...classes].sort((a, b) => Math.abs(b.mean_predicted - b.mean_observed) - Math.abs(a.mean_predicted - a.mean_observed))[0];
  return {
    overconfident: ["bad", `Overconfident: ${both}`, `Losses are higher than the probabilities predict. If sensors drifted, correct them first; otherwise fit a temperature below.${biased}`],
    underconfident: ["watch", `Underconfident: ${both}`, `Losses are lower than the probabilities predict. A temperature fitted below sharpens them.${biased}`],
    drifting: ["bad", `Drifting: ${off.class} predicted ${percent(off.mean_predicted)}, observed ${percent(off.mean_observed)}, ${plural(engines, "engine")}`, `Classes occur more or less often than predicted. No temperature corrects this. Check the sensors below; then retrain the model.${biased}`],
    calibrated: ["good", `Calibrated: ${both}`, `Confidence and accuracy differ by no more than chance explains for this number of engines.${biased}`],
    insufficient_data: ["watch", `Too few labels: ${engines} of ${evidence.engines_needed} engines`, "Report failures and inspections on the page of an engine, or with /v1/outcomes and /v1/labels. Drift below needs no labels."],
  }[found.state];
}
