// What nodes say, in the language of the page. The server says it in English, with values in it, and other packs or
// programs may read it: so it is the page that translates what it shows.

const BETWEEN = /(\n- |; |: )/; // what stands between the parts of a text
const VALUE = /\{(\w+)\}/g;
let templates = []; // [a pattern of an English part, the names of its values, the part in the language of the page]

/** Use these translations: English parts with {names} for values -> the same in another language. */
export function sayBy(map) {
  const literals = (english) => english.replace(VALUE, "").length;
  templates = Object.entries(map ?? {})
    .sort(([one], [other]) => literals(other) - literals(one)) // "{kernel} runs" fits much that others say
    .map(([english, text]) => {
      const pieces = english.split(/\{\w+\}/).map((piece) => piece.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
      return [new RegExp(`^${pieces.join("(.*)")}$`), [...english.matchAll(VALUE)].map(([, name]) => name), text];
    });
}

/** A text of the server. Parts that no translation is known of stay as they are. */
export function say(text) {
  const parts = text.split(BETWEEN); // every second one is what stands between
  return parts.map((part, index) => (index % 2 ? part : sayPart(part))).join("");
}

/** A part: a list of which each piece is known, or one that is known whole, or a list of which some pieces are. */
function sayPart(part) {
  const pieces = part.split(", ");
  const said = pieces.map(translation);
  if (!said.includes(null)) return said.join(", ");
  return translation(part) ?? pieces.map((piece, index) => said[index] ?? piece).join(", ");
}

function translation(part) {
  for (const [pattern, names, text] of templates) {
    const found = part.match(pattern);
    if (found) return text.replace(VALUE, (_, name) => sayPart(found[names.indexOf(name) + 1]));
  }
  return null;
}
