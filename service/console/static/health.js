// Representation of a class: colour, shape and word, so that no information depends on colour alone.

import { h, s } from "./page.js";

const LEVELS = ["good", "watch", "bad"];
const PATHS = {
  good: "M7 1a6 6 0 1 1 0 12A6 6 0 0 1 7 1Z", // a disc
  watch: "M7 1 13.4 12.600H.6Z", // a triangle
  bad: "M4.300 .8h5.400l3.500 3.500v5.400l-3.500 3.500H4.300L.8 9.700V4.300Z", // an octagon
};

/** Return the level of class k of n: the first is good, the last bad, all others are to be watched. */
export const level = (k, n) => (k <= 0 ? LEVELS[0] : k >= n - 1 ? LEVELS[2] : LEVELS[1]);

export function shape(of) {
  return s("svg", { class: "shape", viewBox: "0 0 14 14", "data-level": of, "aria-hidden": "true" }, s("path", { d: PATHS[of] }));
}

/** Give a shape another level. */
export function reshape(picture, of) {
  if (picture.dataset.level === of) return;
  picture.dataset.level = of;
  picture.firstChild.setAttribute("d", PATHS[of]);
}

/** Create the badge of a class. A class that the model lacks (of a former model) is to be watched. */
export function badge(name, classes) {
  const k = classes.indexOf(name);
  return h("span", { class: "health" }, shape(k < 0 ? LEVELS[1] : level(k, classes.length)), h("span", { text: name }));
}

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Return the current colours for charts. */
export function colours() {
  const names = ["good", "watch", "bad", "text", "muted", "line", "line-strong", "accent", "surface", "track"];
  return Object.fromEntries(names.map((name) => [name, variable(`--${name}`)]));
}

/** Return a colour for class k of n, interpolated between those of the three levels. */
export function colour(k, n, of = colours()) {
  const at = n < 2 ? 0 : (2 * k) / (n - 1);
  const [from, to, share] = at <= 1 ? [of.good, of.watch, at] : [of.watch, of.bad, at - 1];
  const mixed = channels(from).map((value, i) => Math.round(value + share * (channels(to)[i] - value)));
  return `rgb(${mixed.join(",")})`;
}

export function faded(of, alpha) {
  return `rgba(${channels(of).join(",")},${alpha})`;
}

function channels(of) {
  if (of.startsWith("rgb")) return of.match(/[\d.]+/g).slice(0, 3).map(Number);
  const hex = of.length === 4 ? [...of.slice(1)].map((c) => c + c).join("") : of.slice(1);
  return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
}
