// The client of the public API, on the host of the page, with API keys if the service requires them.
// Keys are stored in this tab only (sessionStorage).

import { h } from "./page.js";

const KEYS = { api: "engine-health.key", admin: "engine-health.admin-key" };
const KEY_CODES = new Set(["api_key_missing", "api_key_unknown", "not_admin"]); // another key may be accepted
const AGAIN = 3; // seconds until a failed request is retried
const SLACK = 4000; // ms: `since` also includes what was being committed at that time

/** An error response of the service. `code` is from the closed list in docs/api.md; `status` is 0 without a response. */
export class Problem extends Error {
  constructor(status, detail, body = {}) {
    super(detail);
    this.status = status;
    this.code = body.code;
    this.body = body;
  }
}

let skew = 0; // ms by which the clock of the service is ahead
export const now = () => Date.now() + skew;

/** Return the value of `since` for the next request. */
export const since = () => new Date(now() - SLACK).toISOString();

export const get = (path, signal) => call(path, { signal });
export const post = (path, body) => call(path, { method: "POST", body });
export const putAsAdmin = (path, body) => call(path, { method: "PUT", body, kind: "admin" });

async function call(path, { method = "GET", body, signal, kind = "api" }) {
  let why = "";
  for (;;) {
    const shown = sessionStorage.getItem(KEYS[kind]);
    const answer = await send(path, method, body, signal, shown);
    if (answer.ok) return answer.json();
    const problem = await read(answer);
    if (!KEY_CODES.has(problem.code)) throw problem;
    if (sessionStorage.getItem(KEYS[kind]) === shown) sessionStorage.removeItem(KEYS[kind]); // otherwise another call has got one
    why = shown ? problem.message : "";
    if (!sessionStorage.getItem(KEYS[kind])) await askForKey(kind, why);
  }
}

async function send(path, method, body, signal, key) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    const answer = await fetch(path, { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) });
    const date = Date.parse(answer.headers.get("date"));
    if (date) skew = Math.abs(date - Date.now()) < 2000 ? 0 : date - Date.now(); // the header counts whole seconds
    return answer;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, `The service at ${location.host} does not respond. Is it running? "make serve" starts it.`);
  }
}

async function read(answer) {
  const body = await answer.json().catch(() => ({}));
  return new Problem(answer.status, body.detail ?? `${answer.status} ${answer.statusText}`, body);
}

let asking = null;
let declined = false; // the API key; otherwise every refresh would ask again

/** Ask for a key, once for all waiting requests. Closing the dialog rejects them. */
function askForKey(kind, why) {
  if (declined && kind === "api") return Promise.reject(refusal(kind));
  asking ??= dialog(kind, why).finally(() => { asking = null; });
  return asking;
}

function dialog(kind, why) {
  const admin = kind === "admin";
  const field = h("input", { class: "field", type: "password", id: "key", autocomplete: "off", required: true });
  const box = h("dialog", { "aria-labelledby": "key-title" },
    h("form", { method: "dialog" },
      h("div", {},
        h("h2", { id: "key-title", text: admin ? "Admin key needed" : "Key needed" }),
        h("p", { text: admin
          ? "Changing the temperature needs one of ENGINE_HEALTH_ADMIN_KEYS. The key is stored in this tab only."
          : "This service requires one of ENGINE_HEALTH_API_KEYS. The key is stored in this tab only." })),
      why ? h("p", { class: "note bad", role: "alert", text: `Not accepted: ${why}.` }) : null,
      h("label", { class: "labelled", for: "key" }, admin ? "Admin key" : "Key", field),
      h("div", { class: "inline" },
        h("button", { class: "button", type: "button", text: "Cancel", on: { click: () => box.close("") } }),
        h("button", { class: "button first", type: "submit", text: "Use this key" }))));
  return new Promise((resolve, reject) => {
    let used = false;
    box.querySelector("form").addEventListener("submit", () => {
      used = true;
      sessionStorage.setItem(KEYS[kind], field.value);
    });
    box.addEventListener("close", () => {
      box.remove();
      if (used) resolve();
      else {
        declined ||= !admin;
        reject(refusal(kind));
      }
    });
    document.body.append(box);
    box.showModal();
    field.focus();
  });
}

function refusal(kind) {
  return new Problem(401, kind === "admin" ? "No admin key was given." : "This service requires a key. Reload the page to enter one.");
}

/** Return the active model: its classes, thresholds and channels. */
export const model = (signal) => get("v1/model", signal);

/** Return a function that runs `work` immediately and then regularly, until `signal`.
    It pauses while the tab is hidden, and never runs twice at the same time. Errors go to `trouble`, with an early retry. */
export function live(seconds, signal, work, trouble) {
  let timer = 0;
  let busy = false;
  let more = false; // it was called while it was running
  const round = async () => {
    if (busy) return void (more = true);
    clearTimeout(timer);
    [busy, more] = [true, false];
    let wait = seconds;
    try {
      if (!document.hidden) {
        await work();
        trouble(null);
      }
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return;
      trouble(error);
      if (error.status === 401 || error.code === "store_not_configured") return; // a retry changes nothing
      wait = AGAIN;
    } finally {
      busy = false;
    }
    if (!signal.aborted) timer = setTimeout(round, more ? 0 : wait * 1000);
  };
  const seen = () => { if (!document.hidden) round(); };
  document.addEventListener("visibilitychange", seen);
  signal.addEventListener("abort", () => {
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", seen);
  });
  return round;
}
