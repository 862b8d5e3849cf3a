// Charts, drawn by the Plotly of the installed package, each with a table of its values. Independent of the service.

import { h, refill, table } from "./page.js";
import { colours } from "./health.js";

const WRITTEN = "9f215cf04c5486422605d13261cb87401f4e7763b6296af81e98efbc0130da53";
let loading = null;

class MissingPlotly extends Error {}

/** Load Plotly. It would add a style sheet for maps to the page unless an element with this id exists. */
export function plotly() {
  loading ??= new Promise((resolve, reject) => {
    document.head.append(h("meta", { id: WRITTEN }));
    const script = h("script", { src: "console/plotly.min.js", on: {
      load: () => resolve(window.Plotly),
      error: () => { loading = null; reject(new MissingPlotly()); },
    } });
    document.head.append(script);
  });
  return loading;
}

/** A chart with a table of its values, which is filled when it is opened. */
export class Chart {
  constructor(label, height = 260) {
    this.plot = h("div", { class: "chart", role: "img", "aria-label": label, style: { height: `${height}px` } });
    this.details = h("details", { class: "behind", on: { toggle: () => this.fill() } }, h("summary", { text: "As a table" }), this.behind = h("div"));
    this.element = h("figure", {}, this.plot, this.details);
    this.label = label;
    this.height = height;
  }

  async draw(make, tell) {
    this.make = make;
    this.tell = tell;
    this.fill();
    try {
      const Plotly = await plotly();
      if (!this.plot.isConnected) return;
      const { traces, layout } = make(colours());
      const config = { displayModeBar: false, responsive: true, doubleClick: false };
      await Plotly.react(this.plot, traces, framed(layout, this.height), config);
    } catch (error) {
      if (!(error instanceof MissingPlotly)) throw error;
      this.plot.textContent = "Charts need the Python package plotly in the environment of the service: pip install plotly. The table below has the values.";
      this.plot.style.height = "auto";
    }
  }

  /** Draw again in the current colours. */
  again() {
    if (this.make) this.draw(this.make, this.tell);
  }

  describe(label) {
    this.plot.setAttribute("aria-label", label);
  }

  fill() {
    if (!this.details.open || !this.tell) return;
    const { titles, rows } = this.tell();
    refill(this.behind, table(titles, rows, `${this.label}, as a table`));
  }
}

function framed(layout, height) {
  const c = colours();
  const axis = { gridcolor: c.line, linecolor: c["line-strong"], zerolinecolor: c.line, tickcolor: c.line, automargin: true, fixedrange: true, title: { standoff: 8 } };
  const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: c.muted };
  const merged = { ...layout };
  for (const name of ["xaxis", "yaxis", "xaxis2", "yaxis2", "yaxis3"]) if (layout[name] || name.length === 5) merged[name] = { ...axis, ...layout[name] };
  return {
    height, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font, dragmode: false, hovermode: "x unified",
    margin: { l: 48, r: 12, t: 8, b: 40 }, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: c.text } },
    hoverlabel: { bgcolor: c.surface, bordercolor: c["line-strong"], font: { ...font, color: c.text } },
    ...merged,
  };
}
