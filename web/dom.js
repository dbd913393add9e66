// Small things that every part of the panel uses: elements, numbers as text, translations.

const SVG = "http://www.w3.org/2000/svg";
let words = {}; // English -> the language of the page

/** Use these translations, a map of English texts. */
export function translateBy(map) {
  words = map ?? {};
}

/** A text in the language of the page; {name} in it stands for a value. */
export function t(text, values = {}) {
  return (words[text] ?? text).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An HTML element: attributes, listeners as "onclick", children. Texts are never read as HTML. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

const shown = new WeakMap(); // element -> what its children were made of

/** Make an element's children anew if the value that they are made of has changed: painting is not free. */
export function renew(element, value, make) {
  const key = JSON.stringify(value);
  if (shown.get(element) === key) return;
  shown.set(element, key);
  element.replaceChildren(...make(value));
}

export function milliseconds(ms) {
  if (ms === null || ms === undefined) return "-";
  return ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
}

/** Seconds as "41 s", "2:10" or "1:02:10". */
export function duration(seconds) {
  const whole = Math.max(Math.round(seconds), 0);
  if (whole < 60) return `${whole} s`;
  const two = (number) => String(number).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

export function gigabytes(bytes) {
  return (bytes / 2 ** 30).toFixed(1);
}

export function times(factor) {
  return factor === null || factor === undefined ? "-" : `${factor.toFixed(2)}x`;
}

export function relative(change) {
  return change === null ? t("nothing to compare with") : change.toPrecision(3);
}
