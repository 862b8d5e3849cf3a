// The fleet: every stored engine, worst first, live. Only visible rows are rendered.

import { h, s, say, dash, number, percent, plural, span, empty } from "./page.js";
import { get, live, model, now, since } from "./service.js";
import { badge, level, reshape, shape } from "./health.js";
import { explain, term } from "./tooltip.js";

const SECONDS = 2; // between refreshes
const PAGE = 1000; // engines per response
const MOST = 5000; // engines that are shown; others are opened by their name
const TREND = 30; // cycles
const ANEW = 300; // refreshes after which everything is loaded again: expired engines are not reported as changes
const BEYOND = 6; // rows rendered above and below the visible ones
const TILES = 12; // classes to filter by
const RESTS = 10_000; // ms after which a pointer that rests in the list no longer holds the order

const SORTS = {
  worst: ["Worst first", "descending", (a, b) => b.risk - a.risk || sooner(a, b)],
  rul: ["Fewest cycles left", "ascending", (a, b) => sooner(a, b)],
  name: ["By name", "ascending", (a, b) => compare(a, b)],
  newest: ["Newest reading", "ascending", (a, b) => b.at - a.at || compare(a, b)],
  oldest: ["Oldest reading", "descending", (a, b) => a.at - b.at || compare(a, b)],
};
const collator = new Intl.Collator("en", { numeric: true });
const compare = (a, b) => collator.compare(a.id, b.id);
const sooner = (a, b) => (a.rul ?? 1e9) - (b.rul ?? 1e9) || compare(a, b);

export async function open(main, _, { signal, query, remember, beat, tell }) {
  const fleet = new Fleet(main, query, remember);
  window.addEventListener("scroll", () => fleet.sight(), { signal, passive: true });
  window.addEventListener("resize", () => fleet.resize(), { signal });
  document.addEventListener("keydown", (event) => fleet.key(event), { signal });
  signal.addEventListener("abort", () => clearInterval(fleet.clock));
  fleet.look = live(SECONDS, signal, async () => {
    await fleet.load(signal);
    beat("live", "live");
  }, tell);
  await fleet.look();
}

class Fleet {
  constructor(main, query, remember) {
    Object.assign(this, { main, remember, engines: new Map(), made: new Map(), order: [], classes: null, from: null });
    this.picked = query.get("health");
    this.sort = SORTS[query.get("sort")] ? query.get("sort") : "worst";
    this.words = query.get("find") ?? "";
    this.all = query.get("ended") === "yes";
    this.counts = h("div", { class: "counts", role: "group", "aria-label": "Show only engines of one class" });
    this.search = h("input", { class: "field", type: "search", placeholder: "Find an engine", "aria-label": "Find an engine", value: this.words,
      on: { input: () => { this.words = this.search.value; this.changed(); }, keydown: (event) => this.enter(event) } });
    this.sorting = h("select", { class: "field", "aria-label": "Order", on: { change: () => this.by(this.sorting.value) } },
      Object.entries(SORTS).map(([name, [title]]) => h("option", { value: name, text: title, selected: name === this.sort })));
    this.sorting.value = this.sort;
    this.ended = h("input", { type: "checkbox", on: { change: () => this.withEnded(this.ended.checked) } });
    this.ended.checked = this.all;
    this.held = h("span", { class: "held", role: "status" });
    this.rows = h("div", { class: "rows", role: "rowgroup" });
    this.none = h("p", { class: "none", hidden: true });
    this.titles = this.makeTitles();
    this.table = h("div", { class: "fleet", role: "table", "aria-label": "Engines" }, h("div", { role: "rowgroup", class: "titles-group" }, this.titles), this.rows);
    this.pointed = -Infinity; // when the pointer last moved in the list
    this.table.addEventListener("pointermove", () => { this.pointed = performance.now(); });
    this.table.addEventListener("pointerleave", () => { this.pointed = -Infinity; this.draw(); });
    this.table.addEventListener("focusout", (event) => { if (!this.table.contains(event.relatedTarget)) queueMicrotask(() => this.draw()); });
    this.subtitle = h("p", { text: "Loading …" });
    main.append(h("div", { class: "head" }, h("div", {}, h("h1", { text: "Fleet" }), this.subtitle)));
    this.clock = setInterval(() => this.ages(), 1000);
  }

  makeTitles() {
    const title = (text, name, kind = "") => {
      const sorts = name ? { "aria-sort": "none", "data-sort": name } : {};
      return h("div", { role: "columnheader", class: `cell-${kind}`, ...sorts }, name ? explain(h("button", { type: "button", text, on: { click: () => this.by(name) } }), text) : term(text));
    };
    return h("div", { class: "row titles", role: "row" }, title("Engine", "name", "name"), title("Health", "worst", "health"),
      h("div", { role: "columnheader", class: "cell-bars" }, term("Probabilities"), this.worst = h("span")), title("Cycles left", "rul", "rul"), title("Last 30 cycles", null, "trend"),
      title("Possible classes", null, "set"), title("Cycle", null, "cycle"), title("Age", "newest", "age"));
  }

  /** Load everything at first, after an error and from time to time; otherwise what has changed. */
  async load(signal) {
    this.looks = (this.looks ?? 0) + 1;
    const from = this.anew || this.looks % ANEW === 0 ? null : this.from;
    this.anew = false;
    this.from = null; // until this refresh is complete: after an error another service may respond
    if (!from) this.use((await model(signal)).classes);
    const next = since();
    const which = from ? `&since=${encodeURIComponent(from)}` : `&trend=${TREND}${this.all ? "" : "&running=true"}`;
    const engines = from ? this.engines : new Map();
    let page = null;
    do {
      page = await get(`v1/engines?limit=${PAGE}${which}${page ? `&next=${encodeURIComponent(page.next)}` : ""}`, signal);
      for (const row of page.engines) this.keep(row, engines);
    } while (page.next && (from || engines.size < MOST));
    this.engines = engines;
    const counts = [...engines.values()].some((one) => Number.isFinite(one.rul)); // a model may have no RUL
    this.table.classList.toggle("no-rul", !counts && engines.size > 0);
    this.total = from ? Math.max(this.total, engines.size) : page.total;
    this.from = next;
    this.frame();
    this.draw();
  }

  /** Set the classes of the model; other classes discard all rows. */
  use(classes) {
    if (classes.join("\n") === this.classes?.join("\n")) return;
    this.classes = classes;
    this.made.clear();
    this.rows.replaceChildren();
    this.framed = null;
  }

  /** Load failed engines only on request: over time they are the majority, and the worst. */
  withEnded(wanted) {
    this.all = wanted;
    this.anew = true;
    this.changed();
    this.look();
  }

  keep(row, engines) {
    const p = this.classes.map((name) => row.probabilities[name] ?? 0);
    const old = engines.get(row.engine_id);
    const risk = row.probabilities[this.classes.at(-1)] ?? Object.values(row.probabilities).at(-1); // of the model of the prediction, which may be an older one
    const trend = row.trend ?? old?.trend ?? [];
    if (!row.trend && row.cycle !== null && row.cycle > (trend.at(-1)?.[0] ?? -1)) trend.push([row.cycle, risk]);
    while (trend.length && trend[0][0] <= row.cycle - TREND) trend.shift();
    engines.set(row.engine_id, { id: row.engine_id, cycle: row.cycle, k: this.classes.indexOf(row.health), health: row.health, p, risk, rul: row.rul,
      set: row.prediction_set, at: Date.parse(row.updated_at), ended: row.failed_at_cycle, trend });
  }

  /** Build the page once there is an engine. */
  frame() {
    const any = this.engines.size > 0;
    if (any === this.framed) return;
    this.framed = any;
    this.main.querySelectorAll(":scope > :not(.head)").forEach((old) => old.remove());
    if (!any) {
      say(this.subtitle, "No prediction is stored yet.");
      this.main.append(empty("No engine is stored", "An engine appears with its first flight. Send a flight, or start a simulated fleet:",
        h("pre", { text: `.venv/bin/engine-health replay --url ${location.origin}` }), h("p", {}, "The page ", h("a", { href: "docs#/store", text: "API" }), " describes how to send a flight.")));
      return;
    }
    this.worst.textContent = this.classes.at(-1);
    this.filters = [null, ...this.classes.keys()].map((k) => this.filter(k)).reverse();
    this.counts.replaceChildren(...this.filters.map((one) => one.button));
    this.main.append(this.counts,
      h("div", { class: "bar-tools" }, h("div", { class: "search" }, this.search), h("label", { class: "check" }, h("span", { class: "muted order", text: "Order" }), this.sorting),
        h("label", { class: "check" }, this.ended, "Failed engines too"), this.held), this.table, this.none);
    this.resize();
  }

  filter(k) {
    const figure = h("b", { text: "0" });
    const name = k === null ? h("span", { class: "plain", text: "all engines" }) : badge(this.classes[k], this.classes);
    const button = h("button", { type: "button", class: "count", "aria-pressed": "false", on: { click: () => {
      this.picked = k === null || this.picked === this.classes[k] ? null : this.classes[k];
      this.changed();
    } } }, figure, name);
    explain(button, "count");
    return { k, button, figure };
  }

  by(name) {
    this.sort = name === "newest" && this.sort === "newest" ? "oldest" : name;
    this.sorting.value = this.sort;
    this.changed();
  }

  /** Apply another filter or order. */
  changed() {
    const kept = { health: this.picked, sort: this.sort === "worst" ? null : this.sort, find: this.words.trim() || null, ended: this.all ? "yes" : null };
    this.remember(Object.fromEntries(Object.entries(kept).filter(([, value]) => value)));
    this.order = [];
    this.draw();
  }

  /** Return the engines in order. While the pointer or the focus is in the list, no row moves or disappears. */
  choose() {
    const words = this.words.trim().toLowerCase();
    const standing = [...this.engines.values()].filter((one) => this.all || one.ended === null);
    const count = this.classes.map(() => 0);
    for (const one of standing) if (one.k >= 0) count[one.k] += 1;
    const least = [...count].sort((a, b) => b - a)[TILES - 1] ?? 0; // of many classes the most frequent ones
    let free = TILES;
    for (const { k, button, figure } of this.filters) {
      say(figure, number(k === null ? standing.length : count[k]));
      const crowded = k !== null && count.length > TILES && (count[k] < Math.max(1, least) || free-- <= 0);
      button.hidden = crowded && this.picked !== this.classes[k];
      button.setAttribute("aria-pressed", String(k === null ? !this.picked : this.picked === this.classes[k]));
    }
    const found = standing.filter((one) => (!this.picked || this.classes[one.k] === this.picked) && (!words || one.id.toLowerCase().includes(words)));
    found.sort(SORTS[this.sort][2]);
    this.best = found;
    const points = performance.now() - this.pointed < RESTS;
    if (!this.order.length || !(points || this.rows.contains(document.activeElement))) return found;
    const held = this.order.map((one) => this.engines.get(one.id) ?? one);
    const places = new Set(held.map((one) => one.id));
    return [...held, ...found.filter((one) => !places.has(one.id))];
  }

  draw() {
    if (!this.framed) return;
    this.order = this.choose();
    say(this.held, this.order.length !== this.best.length || this.best.some((one, i) => one !== this.order[i]) ? "Order paused while you are in the list" : "");
    const beyond = this.total > this.engines.size ? ` Shown are the ${number(this.engines.size)} worst of ${number(this.total)}; open any other with its full name and Enter.` : "";
    say(this.subtitle, `${plural(this.best.length, "engine")}, ${SORTS[this.sort][0].toLowerCase()}.${beyond}`);
    for (const title of this.titles.children) {
      const mine = title.dataset.sort && (title.dataset.sort === this.sort || (title.dataset.sort === "newest" && this.sort === "oldest"));
      if (title.dataset.sort) title.setAttribute("aria-sort", mine ? SORTS[this.sort][1] : "none");
    }
    this.none.hidden = this.order.length > 0;
    this.table.hidden = this.order.length === 0;
    if (!this.order.length) this.nothing();
    this.table.setAttribute("aria-rowcount", this.order.length + 1);
    this.rows.style.height = `${this.order.length * this.height}px`;
    this.sight(true);
  }

  nothing() {
    const wanted = this.words.trim();
    this.none.replaceChildren(wanted ? `No engine shown matches “${wanted}”${this.picked ? ` and ${this.picked}` : ""}. ` : `No engine is ${this.picked ?? "running"} now. `,
      h("button", { type: "button", class: "button", text: "Show all engines", on: { click: () => { this.picked = null; this.words = this.search.value = ""; this.changed(); } } }),
      wanted ? h("span", {}, " or ", h("a", { href: `#/engine/${encodeURIComponent(wanted)}`, text: `open ${wanted}` })) : "");
  }

  resize() {
    this.height = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
    this.draw();
  }

  /** Render visible rows and remove others; `renew` also updates those that stay. */
  sight(renew = false) {
    if (!this.framed) return;
    const top = this.rows.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(-top / this.height) - BEYOND);
    const last = Math.min(this.order.length, Math.ceil((innerHeight - top) / this.height) + BEYOND);
    if (!renew && first === this.first && last === this.last) return;
    [this.first, this.last] = [first, last];
    const focused = document.activeElement;
    const seen = this.order.slice(first, last);
    const names = new Set(seen.map((one) => one.id));
    for (const [id, row] of this.made) {
      if (!names.has(id) && !row.element.contains(focused)) {
        row.element.remove();
        this.made.delete(id);
      }
    }
    let before = null;
    seen.forEach((engine, i) => {
      let row = this.made.get(engine.id);
      const fresh = !row;
      if (fresh) this.made.set(engine.id, (row = new Row(this.classes)));
      if (fresh || renew) row.show(engine);
      row.place(first + i, this.height);
      const due = before ? before.nextSibling : this.rows.firstChild;
      if (due !== row.element) this.rows.insertBefore(row.element, due);
      before = row.element;
    });
    if (focused !== document.activeElement && focused?.isConnected) focused.focus({ preventScroll: true });
  }

  ages() {
    if (!document.hidden) for (const row of this.made.values()) row.age();
  }

  enter(event) {
    if (event.key === "Escape") { this.search.value = this.words = ""; this.changed(); }
    if (event.key !== "Enter") return;
    const exact = this.search.value.trim();
    const all = this.total <= this.engines.size; // then an engine that is not shown does not exist
    if (!exact) return;
    if (this.order.length > 1 && all && !this.engines.has(exact)) this.made.get(this.order[0].id)?.link.focus();
    else location.hash = `#/engine/${encodeURIComponent(this.order.length === 1 ? this.order[0].id : exact)}`;
  }

  /** "/" focuses the search; arrow keys move between engines. */
  key(event) {
    if (event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName)) {
      event.preventDefault();
      this.search.focus();
    }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const row = step && document.activeElement.closest?.(".rows .row");
    if (!row) return;
    event.preventDefault();
    const next = this.order[this.order.findIndex((one) => one.id === row.dataset.engine) + step];
    this.made.get(next?.id)?.link.focus();
  }
}

/** The row of one engine. */
class Row {
  constructor(classes) {
    this.classes = classes;
    this.link = h("a", {});
    this.shape = shape("good");
    this.health = h("span");
    this.bars = classes.map((_, k) => h("i", { "data-level": level(k, classes.length) }));
    this.bar = h("div", { class: "bar", role: "img" }, this.bars);
    this.risk = h("span");
    this.rul = h("b");
    this.area = s("path", { class: "area" });
    this.line = s("path");
    this.spark = s("svg", { class: "spark", viewBox: "0 0 100 28", preserveAspectRatio: "none", role: "img" }, this.area, this.line);
    this.set = h("span", { class: "sets" });
    this.cycle = h("div", { class: "cell-cycle muted", role: "cell" });
    this.when = h("div", { class: "cell-age muted", role: "cell" });
    const cell = (name, ...inside) => h("div", { class: `cell-${name}`, role: "cell" }, inside);
    this.element = h("div", { class: "row", role: "row", on: { click: (event) => { if (event.target.tagName !== "A") this.link.click(); } } },
      cell("name", this.link), cell("health", h("span", { class: "health" }, this.shape, this.health)), cell("bars", this.bar, this.risk),
      cell("rul", this.rul, h("small", { text: " cycles" })), cell("trend", this.spark), cell("set", this.set), this.cycle, this.when);
  }

  show(engine) {
    if (engine === this.engine) return;
    this.engine = engine;
    const n = this.classes.length;
    this.element.dataset.engine = engine.id;
    say(this.link, engine.id);
    this.link.setAttribute("href", `#/engine/${encodeURIComponent(engine.id)}`);
    say(this.health, engine.ended === null ? engine.health : "failed");
    this.health.className = engine.ended === null ? "" : "ended";
    const of = engine.k < 0 ? "watch" : level(engine.k, n);
    reshape(this.shape, of);
    this.bars.forEach((bar, k) => {
      bar.hidden = engine.p[k] < 0.004;
      bar.style.setProperty("width", `${(100 * engine.p[k]).toFixed(1)}%`);
    });
    this.bar.setAttribute("aria-label", this.classes.map((name, k) => `${name} ${percent(engine.p[k])}`).join(", "));
    say(this.risk, percent(engine.risk));
    say(this.rul, engine.rul === null || engine.rul === undefined ? dash : number(engine.rul));
    this.element.dataset.level = of;
    this.trend(engine.trend);
    const set = engine.set ?? [];
    if (this.set.dataset.of !== set.join()) {
      this.set.dataset.of = set.join();
      const shapes = set.map((name) => shape(level(this.classes.indexOf(name), n)));
      this.set.replaceChildren(...shapes, h("span", { class: "hidden", text: set.join(", ") || "none" }));
      this.set.title = set.length > 1 ? `Possible classes: ${set.join(" or ")}; inspect` : set.join();
    }
    say(this.cycle, engine.cycle === null ? dash : number(engine.cycle));
    this.age();
  }

  trend(points) {
    const end = points.at(-1)?.[0] ?? 0;
    const at = points.map(([cycle, p]) => `${(100 - (end - cycle) * (100 / (TREND - 1))).toFixed(1)} ${(26 - 24 * p).toFixed(1)}`);
    this.line.setAttribute("d", at.length > 1 ? `M${at.join("L")}` : "");
    this.area.setAttribute("d", at.length > 1 ? `M${at.join("L")}L100 28L${at[0].split(" ")[0]} 28Z` : "");
    const from = points.length ? percent(points[0][1]) : dash;
    this.spark.setAttribute("aria-label", points.length > 1 ? `${this.classes.at(-1)}: from ${from} to ${percent(points.at(-1)[1])} in ${points.length} cycles` : "no trend yet");
  }

  age() {
    say(this.when, span((now() - this.engine.at) / 1000));
  }

  place(i, height) {
    if (this.at === i * height) return;
    this.at = i * height;
    this.element.style.transform = `translateY(${this.at}px)`;
    this.element.setAttribute("aria-rowindex", i + 2);
  }
}
