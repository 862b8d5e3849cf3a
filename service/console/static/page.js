// Create elements, and format numbers for people. Independent of the service and of pages.

import { term } from "./tooltip.js";

const SVG = "http://www.w3.org/2000/svg";

/** Create an element. `props`: attributes; `on` a map of listeners, `style` a map of properties, `text` its text. */
export function h(name, props = {}, ...children) {
  return filled(document.createElement(name), props, children);
}

/** Create an element of an SVG picture. */
export function s(name, props = {}, ...children) {
  return filled(document.createElementNS(SVG, name), props, children);
}

function filled(element, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (key === "style") for (const [name, one] of Object.entries(value)) element.style.setProperty(name, one);
    else if (key === "text") element.textContent = value;
    else if (key === "value") element.value = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Change a text only if it differs, which saves work of the browser. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const dash = "–";
const thin = " ";

/** Format a probability: never 0 % or 100 % by rounding. */
export function percent(p, digits = 0) {
  if (p === null || p === undefined) return dash;
  const least = 0.5 * 10 ** -digits / 100;
  if (p > 0 && p < least) return `<${(2 * least * 100).toFixed(digits)}${thin}%`;
  if (p < 1 && p > 1 - least) return `>${(100 - 2 * least * 100).toFixed(digits)}${thin}%`;
  return `${(100 * p).toFixed(digits)}${thin}%`;
}

export function number(value, digits = 0) {
  if (value === null || value === undefined || Number.isNaN(value)) return dash;
  return value.toLocaleString("en-GB", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function signed(value, digits = 1) {
  if (value === null || value === undefined) return dash;
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
}

export function plural(n, one, many = `${one}s`) {
  return `${number(n)} ${n === 1 ? one : many}`;
}

/** Format a duration in one unit. */
export function span(seconds) {
  if (seconds === null || seconds === undefined) return dash;
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const [size, name] = units.find(([size]) => seconds >= 2 * size) ?? [1, "s"];
  if (seconds > 0 && seconds < 1) return `<1${thin}s`;
  return `${Math.max(0, Math.floor(seconds / size))}${thin}${name}`;
}

export function moment(text) {
  return new Date(text).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

/** Create a table. Titles are strings, or [title, "number", key of the glossary]; cells strings, numbers or elements. */
export function table(titles, rows, caption) {
  const heads = titles.map((title) => (Array.isArray(title) ? title : [title, ""]));
  const cell = (value, k) => h("td", { class: heads[k][1] || null }, value instanceof Node ? value : String(value ?? dash));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h("table", {},
      h("caption", { class: "hidden", text: caption }),
      h("thead", {}, h("tr", {}, heads.map(([title, kind, key]) => h("th", { scope: "col", class: kind || null }, term(title, key))))),
      h("tbody", {}, rows.map((row) => h("tr", row.props ?? {}, (row.cells ?? row).map(cell))))));
}

/** Replace the content of an element. Scroll positions and focus of its tables and buttons are kept. */
export function refill(element, ...children) {
  const named = (one) => one.getAttribute("aria-label");
  const parts = () => element.querySelectorAll(".scroll, button, a");
  const focused = element.contains(document.activeElement) ? document.activeElement : null;
  const called = focused && (named(focused) ?? focused.textContent);
  const places = new Map([...parts()].map((one) => [named(one), [one.scrollTop, one.scrollLeft]]));
  element.replaceChildren(...children);
  for (const one of parts()) {
    const [top, left] = places.get(named(one)) ?? [0, 0];
    if (top || left) Object.assign(one, { scrollTop: top, scrollLeft: left });
    if (called !== null && called === (named(one) ?? one.textContent)) one.focus({ preventScroll: true });
  }
}

/** Create the text of an empty page: what is missing, and what to do. */
export function empty(title, text, ...more) {
  return h("section", { class: "card empty" }, h("h2", { text: title }), h("p", { text }), ...more);
}

/** Create a list of figures: [name, value, small text, key of the glossary]. */
export function facts(figures) {
  return h("dl", { class: "facts" }, figures.map(([name, value, small, key]) =>
    h("div", {}, h("dt", {}, term(name, key)), h("dd", {}, value, small ? h("small", { text: ` ${small}` }) : null))));
}
