/** Elements, numbers and messages. Strings of the corpus become text nodes and attributes, never HTML. */

const SVG = "http://www.w3.org/2000/svg";

function fill(node, options, children) {
  for (const [name, value] of Object.entries(options)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Make an element: `el("p.note", {title: "..."}, "text", child)`. */
export function el(name, options = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  if (tag === "button") node.type = "button";
  return fill(node, options, children);
}

/** Make an element of an SVG picture. */
export const svg = (tag, options = {}, ...children) => fill(document.createElementNS(SVG, tag), options, children);

export const byId = (id) => document.getElementById(id);

const whole = new Intl.NumberFormat("en");

/** Write a count with separators: 12,345. */
export const count = (value) => whole.format(value);

/** Write a count shortly: 37.2M. */
export const shortCount = (value) => new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value);

/** Write a measured value with at most four significant digits. */
export function number(value) {
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return Math.abs(value) < 10000 ? String(value) : whole.format(value);
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-4 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(4)));
}

/** Write rows with their noun: 1 row, 12 rows. */
export const many = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

/** Show a message at the bottom for some seconds, or until its action is taken. */
export function toast(message, { bad = false, action = null, run = null } = {}) {
  const box = el(bad ? "div.toast.bad" : "div.toast", {}, el("span", {}, message));
  if (action) box.append(el("button.link", { onclick: () => (box.remove(), run()) }, action));
  byId("toasts").replaceChildren(box);
  setTimeout(() => box.remove(), bad ? 12000 : 6000);
}

/** Open the dialog with a title and content; Escape and its close button close it. */
export function dialog(title, ...content) {
  const box = byId("dialog");
  const close = el("button.quiet.close", { "aria-label": "Close", onclick: () => box.close() }, "×");
  box.replaceChildren(el("div.dialog-head", {}, el("h2", { id: "dialog-title" }, title), close), ...content);
  if (!box.open) box.showModal();
  return box;
}

/** Copy a text, or show it to be copied where the browser forbids that. */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`${what} copied.`);
  } catch {
    dialog(what, el("textarea.mono", { rows: 5, readonly: true, "aria-label": what }, text));
  }
}

/** Split a text into text nodes and <mark>s around the words. */
export function highlighted(text, words) {
  const wanted = words.filter(Boolean).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  if (!wanted.length) return [text];
  return text.split(new RegExp(`(${wanted.join("|")})`, "gi")).map((part, i) => (i % 2 ? el("mark", {}, part) : part));
}

/** Call a function once nothing has asked for it for some milliseconds. */
export function later(run, wait) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => run(...given), wait);
  };
}
