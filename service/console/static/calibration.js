// How far the probabilities can be believed: in words, in charts, and what can be done about it.

import { h, refill, table, dash, facts, moment, number, percent, plural, signed, span } from "./page.js";
import { get, live, post, putAsAdmin } from "./service.js";
import { level, shape } from "./health.js";
import { Chart } from "./charts.js";

const SECONDS = 20;
const PERIODS = 24;
const WINDOWS = [["", "all time"], ["90d", "the last 90 days"], ["30d", "the last 30 days"], ["7d", "the last 7 days"], ["24h", "the last 24 hours"], ["1h", "the last hour"]];
const FAR = 0.25; // PSI that is called a change of the population, as in ops/alerts.yml
const NEAR = 0.1;
const Z = 1.645; // 90 % of a normal distribution lie within so many standard deviations

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
    this.verdict = h("section", { class: "card verdict", "aria-live": "polite" }, h("p", { text: "Asking the service …" }));
    this.figures = h("section", { class: "card" });
    this.reliability = new Chart("How often each confidence was right", 320);
    this.overTime = new Chart("Loss over time, realised and expected", 320);
    this.classes = h("section", { class: "card" });
    this.labels = h("section", { class: "card" });
    this.drift = h("section", { class: "card half" });
    this.changes = h("div");
    this.said = h("div", { role: "status" });
    this.fit = h("button", { type: "button", class: "button first", text: "Fit a temperature", on: { click: () => this.refit() } });
    this.back = h("button", { type: "button", class: "button", text: "Take the last change back", on: { click: (event) => { if (event.detail < 2) this.change({ rollback: true }, "Taken back."); } } });
    this.body = h("div", { class: "grid", hidden: true }, this.figures,
      h("section", { class: "card half" }, h("h2", { text: "How often is each confidence right?" }),
        h("p", { text: "On the line, what it says is what happens. The bars are where chance alone puts 90 % of such bins." }), this.reliability.element),
      h("section", { class: "card half" }, h("h2", { text: "Loss over time" }),
        h("p", { text: "Above its band, the model was surer than it had reason to be in that time." }), this.overTime.element),
      h("div", { class: "half column" }, this.classes, this.labels, h("section", { class: "card stack" }, h("h2", { text: "Temperature" }),
        h("p", { class: "muted", text: "Divides the logits: above 1 flattens the probabilities, below 1 sharpens them, and never changes their order. A fit is scored on engines left out and applied only by you." }),
        this.changes, h("div", { class: "inline" }, this.fit, this.back), this.said)), this.drift);
    main.append(h("div", { class: "head" }, h("div", {}, h("h1", { text: "Calibration" }), h("p", { text: "Whether 90 % means nine times in ten, from the truths that have come in." })),
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
    if (asked !== this.window) return; // another time was chosen meanwhile
    this.found = found;
    this.body.hidden = false;
    this.speak(found);
    this.tellFigures(found);
    this.drawReliability(found.reliability);
    this.drawTime(found.over_time);
    this.tellClasses(found.classes);
    this.tellLabels(found);
    this.tellDrift(found.drift);
    this.tellTemperature(tempered);
  }

  speak(found) {
    const [of, title, text] = verdict(found);
    if (this.verdict.textContent === title + text) return; // what did not change is not read out again
    this.verdict.dataset.state = found.state;
    this.verdict.replaceChildren(shape(of), h("div", {}, h("h2", { text: title }), h("p", { text })));
  }

  tellFigures({ cross_entropy: loss, ece, accuracy, brier, conformal, n, engines }) {
    this.figures.replaceChildren(facts([
      ["Truths", number(n), `of ${plural(engines, "engine")}`],
      ["Right", percent(accuracy)],
      ["Loss", loss.realised === null ? dash : loss.realised.toFixed(3), loss.expected === null ? "" : `nats; ${loss.expected.toFixed(3)} expected`],
      ["Gap by engines", loss.z_engines === null ? dash : signed(loss.z_engines), "standard errors"],
      ["ECE", ece.value === null ? dash : ece.value.toFixed(3), ece.noise_band ? `chance gives ${ece.noise_band.map((x) => x.toFixed(3)).join(" to ")}` : ""],
      ["Brier", brier === null ? dash : brier.toFixed(3)],
      ...(conformal ? [["Sets hold the truth", percent(conformal.coverage), `${percent(conformal.level)} promised; ${conformal.mean_size === null ? dash : conformal.mean_size.toFixed(2)} classes each`]] : []),
    ]));
  }

  drawReliability(bins) {
    const some = bins.filter((bin) => bin.n > 0);
    const half = (bin) => Z * Math.sqrt((bin.confidence * (1 - bin.confidence)) / bin.n);
    const most = Math.max(1, ...some.map((bin) => bin.n));
    this.reliability.draw((c) => ({
      traces: [
        { x: [0, 1], y: [0, 1], mode: "lines", name: "as it says", line: { color: c["line-strong"], dash: "dot", width: 1.4 }, hoverinfo: "skip" },
        { x: some.map((bin) => bin.confidence), y: some.map((bin) => bin.confidence), mode: "markers", name: "chance", marker: { size: 0.1, color: c.muted }, error_y: { type: "data", array: some.map(half), color: c["line-strong"], thickness: 7, width: 0 }, hoverinfo: "skip" },
        { x: some.map((bin) => bin.confidence), y: some.map((bin) => bin.accuracy), mode: "lines+markers", name: "right", line: { color: c.accent, width: 1.6 }, marker: { color: c.accent, size: some.map((bin) => 6 + 10 * Math.sqrt(bin.n / most)) }, customdata: some.map((bin) => bin.n), hovertemplate: "says %{x:.1%}, right %{y:.1%}, %{customdata} predictions<extra></extra>" },
      ],
      layout: { xaxis: { title: { text: "says" }, range: [0, 1.02], tickformat: ".0%" }, yaxis: { title: { text: "is right" }, range: [0, 1.05], tickformat: ".0%" }, hovermode: "closest" },
    }), () => ({ titles: ["Confidence", ["Predictions", "number"], ["Says", "number"], ["Right", "number"], ["Chance", "number"]], rows: some.map((bin) => [`${percent(bin.lower)} to ${percent(bin.upper)}`, number(bin.n), percent(bin.confidence, 1), percent(bin.accuracy, 1), `± ${percent(half(bin), 1)}`]) }));
  }

  drawTime(periods) {
    const some = periods.filter((one) => one.n > 0);
    const x = some.map((one) => new Date((Date.parse(one.from) + Date.parse(one.to)) / 2));
    const edge = (sign) => some.map((one) => Math.max(0, one.expected + sign * 2 * one.noise));
    this.overTime.draw((c) => ({
      traces: [
        { x, y: edge(-1), mode: "lines", line: { width: 0 }, showlegend: false, hoverinfo: "skip" },
        { x, y: edge(1), mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: "rgba(128,140,155,.22)", name: "chance, if rows were independent", hoverinfo: "skip" },
        { x, y: some.map((one) => one.expected), mode: "lines", name: "expected", line: { color: c.muted, dash: "dash", width: 1.6 }, hovertemplate: "%{y:.3f}" },
        { x, y: some.map((one) => one.realised), mode: "lines+markers", name: "realised", line: { color: c.accent, width: 2 }, marker: { size: 5 }, customdata: some.map((one) => one.n), hovertemplate: "%{y:.3f} of %{customdata}" },
      ],
      layout: { xaxis: { title: { text: "when predicted" }, tickangle: 0, nticks: 5 }, yaxis: { title: { text: "nats" }, rangemode: "tozero" } },
    }), () => ({ titles: ["From", ["Truths", "number"], ["Realised", "number"], ["Expected", "number"], ["Chance", "number"]], rows: some.map((one) => [moment(one.from), number(one.n), one.realised.toFixed(3), one.expected.toFixed(3), `± ${(2 * one.noise).toFixed(3)}`]) }));
  }

  tellClasses(classes) {
    const name = (one, k) => h("span", { class: "health" }, shape(level(k, classes.length)), h("span", { text: one.class }));
    refill(this.classes, h("h2", { text: "By class" }), h("p", { text: "How often each class was said to be and was, and how well it was found." }),
      table(["Class", ["Truths", "number"], ["Said", "number"], ["Seen", "number"], ["Found", "number"], ["Right when called", "number"], ["ECE", "number"]],
        classes.map((one, k) => [name(one, k), number(one.n), percent(one.mean_predicted), percent(one.mean_observed), percent(one.recall), percent(one.precision), one.ece === null ? dash : one.ece.toFixed(3)]), "By class"));
  }

  tellLabels({ labels }) {
    const { lag_seconds: lag, sources } = labels;
    const rows = labels.by_age.filter((band) => band.n > 0).map((band) => [band.to_seconds === null ? `older than ${span(band.from_seconds)}` : `${band.from_seconds ? span(band.from_seconds) : "0"} to ${span(band.to_seconds)}`,
      number(band.n), meter(band.share), percent(band.share)]);
    refill(this.labels, h("h2", { text: "Truths and their delay" }),
      h("p", { text: labels.selection_biased ? "Fewer than four in five predictions have a truth yet. Those that have one may be the hard ones." : "Enough predictions have a truth to speak for the fleet." }),
      facts([["Have a truth", percent(labels.share)], ["Half came within", span(lag.p50)], ["Nine in ten within", span(lag.p90)], ["Told by ends", number(sources.outcome)], ["by running on", number(sources.survival)], ["by inspections", number(sources.inspection)]]),
      rows.length ? table(["Age of the prediction", ["Predictions", "number"], "Share", ["Have a truth", "number"]], rows, "Share with a truth by age") : h("p"));
  }

  tellDrift(drift) {
    if (!drift) {
      this.drift.replaceChildren(h("h2", { text: "Drift" }), h("p", { text: "This model has no reference to compare with." }));
      return;
    }
    const all = [["confidence", drift.confidence], ["entropy", drift.entropy], ...Object.entries(drift.channels)].filter(([, one]) => one && one.psi !== null);
    all.sort((a, b) => b[1].psi - a[1].psi);
    const word = (psi) => (psi >= FAR ? ["bad", "far off"] : psi >= NEAR ? ["watch", "moved"] : ["good", "as before"]);
    const rows = all.map(([name, one]) => {
      const [of, text] = word(one.psi - one.noise);
      return [name.replace("sensor_", "sensor ").replace("op_setting_", "setting "), h("span", { class: "health small" }, shape(of), text), meter(Math.min(1, one.psi / (4 * FAR)), of), one.psi.toFixed(3), one.noise.toFixed(3)];
    });
    refill(this.drift, h("h2", { text: "Drift, without any truth" }), h("p", { text: "Population stability index against engines held out in training. A fleet of one kind differs from a mixed one without anything being broken." }),
      rows.length ? table(["What", "State", "Distance", ["PSI", "number"], ["Chance", "number"]], rows, "Drift of confidence, entropy and each channel") : h("p", { class: "note", text: "No prediction in this time." }));
  }

  tellTemperature({ temperature, temperature_source: source, changes }) {
    const rows = [...changes].reverse().map((one) => [moment(one.changed_at), one.temperature.toFixed(4), one.rollback ? "taken back" : one.fit_id ? "from a fit" : "by hand", h("code", { text: one.who })]);
    refill(this.changes, facts([["In force", temperature.toFixed(4), { artefact: "as the model was delivered", fit: "fitted here" }[source] ?? source]]),
      rows.length ? table(["Changed", ["Temperature", "number"], "How", "By"], rows, "Every change of the temperature, newest first") : h("p", { class: "muted small", text: "It was never changed." }));
    this.back.disabled = !rows.length || source === "artefact";
  }

  refit() {
    return this.alone("No fit", async () => {
      this.said.replaceChildren(h("p", { class: "muted", text: "Fitting …" }));
      const fit = await post("v1/calibration/fits", this.window ? { window: this.window } : {});
      const loss = fit.held_out.cross_entropy;
      const apply = h("button", { type: "button", class: "button first", text: `Apply ${fit.temperature.toFixed(4)}`, on: { click: () => this.change({ fit_id: fit.fit_id }, "Applied.") } });
      this.said.replaceChildren(h("div", { class: "note stack" },
        h("p", {}, h("b", { text: `Temperature ${fit.temperature.toFixed(4)}` }), ` from ${plural(fit.n, "truth")} of ${plural(fit.engines, "engine")}; in force is ${fit.active_temperature.toFixed(4)}.`),
        h("p", { text: `On engines left out the loss goes from ${loss.before.toFixed(4)} to ${loss.after.toFixed(4)} nats. ${fit.significant ? "The whole interval is a gain." : "That may still be chance: the interval includes none."}` }),
        apply));
    });
  }

  change(body, done) {
    return this.alone("Nothing was changed", async () => {
      const now = await putAsAdmin("v1/calibration/temperature", body);
      this.said.replaceChildren(h("p", { class: "note", text: `${done} The temperature is ${now.temperature.toFixed(4)} now; every worker follows within two seconds.` }));
      this.look();
    });
  }

  /** One thing at a time. A fit that could not be applied stays to be applied. */
  async alone(title, work) {
    if (this.changing) return;
    this.changing = true;
    this.said.querySelector(".bad")?.remove();
    try {
      await work();
    } catch (error) {
      this.said.querySelector("p.muted")?.remove();
      this.said.append(h("p", { class: "note bad", text: `${title}: ${error.message}.`.replace("..", ".") }));
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

/** The state in words: level of its shape, title, and what to do. */
export function verdict(found) {
  const { accuracy, engines, classes, evidence } = found;
  const mean = found.label_free.error ? accuracy + found.label_free.error.accuracy : null;
  const both = `says ${percent(mean)}, right ${percent(accuracy)}, ${plural(engines, "engine")}`;
  const biased = found.labels.selection_biased ? " Fewer than four in five predictions have a truth so far; those that have may be the hard ones." : "";
  const range = found.cross_entropy.interval;
  const surely = found.state === "calibrated" && range && range[0] * range[1] > 0; // but not for who looks as often as they like
  if (surely) {
    const how = range[0] > 0 ? "surer than it is right" : "right more often than it says";
    return ["watch", `No alarm: ${both}`, `In these truths it is ${how}, beyond what this one look would give by chance. Proof that may be looked at every day needs more engines; wait, or fit a temperature below.${biased}`];
  }
  const off = [...classes].sort((a, b) => Math.abs(b.mean_predicted - b.mean_observed) - Math.abs(a.mean_predicted - a.mean_observed))[0];
  return {
    overconfident: ["bad", `Over-confident: ${both}`, `It is surer than it has reason to be. If sensors drifted, mend those first; else fit a temperature below.${biased}`],
    underconfident: ["watch", `Under-confident: ${both}`, `It is right more often than it says. A temperature fitted below sharpens it.${biased}`],
    drifting: ["bad", `Drifting: ${off.class} said ${percent(off.mean_predicted)}, seen ${percent(off.mean_observed)}, ${plural(engines, "engine")}`, `Classes occur more or less often than the probabilities say, which no temperature mends. Look at the sensors below; then train again.${biased}`],
    calibrated: ["good", `Calibrated: ${both}`, `What it says and what happens differ by no more than chance among so many engines.${biased}`],
    insufficient_data: ["watch", `Too few truths to tell: ${engines} of ${evidence.engines_needed} engines`, "Record how engines ended or what inspections found, on an engine's page or with /v1/outcomes and /v1/labels. Drift below needs no truth."],
  }[found.state];
}
