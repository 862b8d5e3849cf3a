// Selects the page by the fragment of the address, for example #/engine/FD001-24. A page ends with a signal.

import { h, empty } from "./page.js";
import { Problem } from "./service.js";
import * as calibration from "./calibration.js";
import * as engine from "./engine.js";
import * as explorer from "./explorer.js";
import * as fleet from "./fleet.js";

// All pages are loaded at the start: a page that is loaded later could not be shown while the service is unreachable.
const PAGES = {
  fleet: ["Fleet", fleet],
  engine: ["Engine", engine],
  calibration: ["Calibration", calibration],
  explorer: ["Explorer", explorer],
};
const main = document.getElementById("page");
const pulse = document.getElementById("pulse");
const trouble = document.getElementById("trouble");
let leave = null;
let first = true;

async function show() {
  leave?.abort();
  const ending = (leave = new AbortController());
  const [path, query] = (location.hash.replace(/^#\/?/, "") || "fleet").split("?");
  const [name, ...rest] = path.split("/");
  const [title, opened] = PAGES[name] ?? PAGES.fleet;
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.hash === `#/${name}` || (name === "engine" && link.hash === "#/fleet");
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const id = decoded(rest.join("/"));
  document.title = `${id || title} – engine-health`;
  tell(null);
  pulse.textContent = "";
  main.replaceChildren();
  window.scrollTo(0, 0);
  if (!first) main.focus({ preventScroll: true });
  first = false;
  const mine = (say) => (...words) => { if (!ending.signal.aborted) say(...words); }; // a page that was left has no effect
  const around = { signal: ending.signal, query: new URLSearchParams(query ?? ""), remember: mine(remember), beat: mine(beat), tell: mine(tell) };
  try {
    await opened.open(main, id, around);
  } catch (error) {
    if (error.name !== "AbortError") around.tell(error);
  }
}

/** Decode an address; one that was typed may contain a single %. */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Store the state of a page in the address, without an entry in the browser's history. */
function remember(query) {
  const [path] = (location.hash || "#/fleet").split("?");
  const text = new URLSearchParams(query).toString();
  history.replaceState(null, "", path + (text ? `?${text}` : ""));
}

/** Set the state of the connection: "live", "paused" or "down". */
function beat(state, text) {
  pulse.dataset.state = state;
  if (pulse.textContent !== text) pulse.textContent = text;
}

/** Show an error and what to do; null hides it. */
function tell(error) {
  trouble.hidden = !error;
  if (!error) return;
  beat("down", "not live");
  const [title, advice] = explained(error);
  if (error.code === "store_not_configured") {
    trouble.hidden = true;
    beat("paused", "no store");
    main.replaceChildren(empty("This service has no store", "Fleet, engines and calibration show stored predictions. Start the service with a database to store predictions from then on:",
      h("pre", { text: "ENGINE_HEALTH_DATABASE_URL=sqlite:///engine-health.db make serve" }), h("p", {}, h("a", { href: "#/explorer", text: "The explorer needs no store" }))));
    return;
  }
  trouble.replaceChildren(h("strong", { text: title }), advice);
}

function explained(error) {
  if (!(error instanceof Problem)) return ["This page failed.", `${error.message}. Reload the page. If the error remains, please report it.`];
  if (error.status === 0) return ["Not connected.", `${error.message} This page retries.`];
  if (error.status === 401) return ["Key needed.", error.message];
  if (error.status === 503) return ["Not available now.", `${error.message}. This page retries.`];
  if (error.code === "overloaded") return ["Overloaded.", "The service has more requests than it can answer. This page retries."];
  return [`${error.body.title ?? "Rejected"}.`, error.message];
}

const theme = document.getElementById("theme");
const dark = () => document.documentElement.dataset.theme === "dark";
const colour = (to) => {
  document.documentElement.dataset.theme = to ? "dark" : "light";
  theme.setAttribute("aria-pressed", String(to));
  window.dispatchEvent(new Event("themechange"));
};
theme.setAttribute("aria-pressed", String(dark()));
theme.addEventListener("click", () => {
  colour(!dark());
  localStorage.setItem("engine-health.theme", dark() ? "dark" : "light");
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
  if (!localStorage.getItem("engine-health.theme")) colour(event.matches);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
window.addEventListener("hashchange", show);
show();
