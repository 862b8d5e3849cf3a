// Tooltips that explain column heads and figures: shown on hover and on focus, closed by Escape, read by screen readers.

import { GLOSSARY } from "./glossary.js";

const GAP = 6; // px between a term and its tooltip, and to the edge of the window
const DESCRIBED = "[aria-describedby^=tip-]";
let shown = null; // the element whose tooltip is visible

/** Describe an element by an entry of the glossary. Return the element. */
export function explain(element, key) {
  const id = `tip-${key.toLowerCase().replace(/[^a-z0-9]+/g, "-")}`;
  if (!document.getElementById(id)) {
    const tip = document.createElement("div");
    Object.assign(tip, { id, className: "tip", hidden: true, textContent: GLOSSARY[key] });
    tip.setAttribute("role", "tooltip");
    document.body.append(tip);
  }
  element.setAttribute("aria-describedby", id);
  return element;
}

/** Return a title as a term with a tooltip; as plain text if the glossary has no entry for it. */
export function term(title, key = title) {
  if (!GLOSSARY[key]) return title;
  const button = document.createElement("button");
  Object.assign(button, { type: "button", className: "term", textContent: title });
  return explain(button, key);
}

const tipOf = (element) => document.getElementById(element.getAttribute("aria-describedby"));

function show(element) {
  if (element === shown) return;
  hide();
  shown = element;
  tipOf(shown).hidden = false;
  place();
}

/** Place the visible tooltip below its term, or above where there is no space. */
function place() {
  if (!shown) return;
  const tip = tipOf(shown);
  const at = shown.getBoundingClientRect();
  const left = Math.min(Math.max(GAP, at.left), innerWidth - tip.offsetWidth - GAP);
  const below = at.bottom + GAP;
  const top = below + tip.offsetHeight > innerHeight ? Math.max(GAP, at.top - tip.offsetHeight - GAP) : below;
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${top}px`);
}

function hide() {
  if (shown) tipOf(shown).hidden = true;
  shown = null;
}

const described = (event) => (event.target instanceof Element ? event.target.closest(DESCRIBED) : null);
for (const kind of ["pointerover", "focusin"]) {
  document.addEventListener(kind, (event) => {
    const element = described(event);
    if (element) show(element);
    else if (!(event.target instanceof Element && event.target.closest(".tip"))) hide(); // a tooltip can be hovered itself
  });
}
document.addEventListener("focusout", hide);
document.addEventListener("scroll", place, true); // focus may scroll the term into view
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
});
window.addEventListener("hashchange", hide);
