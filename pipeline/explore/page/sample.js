/** One picture: everything that the corpus knows of it. */

import { decoded, get, named, picture } from "./api.js";
import { count, el, highlighted, many, number } from "./dom.js";
import { image, place } from "./grid.js";
import { link } from "./state.js";

const isAddress = (text) => /^https?:\/\/\S+$/i.test(text);

/** Write a value of any shape as text, lists and dictionaries within each other. */
function written(value) {
  if (value === null || value === undefined || value === "") return el("span.soft", {}, "—");
  if (Array.isArray(value)) return value.every((one) => typeof one !== "object") ? value.join(", ") : el("ul", {}, ...value.map((one) => el("li", {}, written(one))));
  if (typeof value === "object") return facts(value);
  if (typeof value === "number") return number(value);
  const text = String(value);
  return isAddress(text) ? el("a", { href: text, rel: "noopener noreferrer", target: "_blank" }, text) : text;
}

const facts = (value) => el("dl.facts", {}, ...Object.entries(value).flatMap(([name, one]) => [el("dt", {}, name), el("dd", {}, written(one))]));

const section = (title, ...content) => el("section.block", { "aria-label": title }, el("h3", {}, title), ...content);

function captions(sample, words) {
  const cards = sample.captions.map(({ column, text, captioner }) => {
    const body = text ? el("p.caption", {}, ...highlighted(text, words)) : el("p.soft", {}, "no caption");
    return el("article.card", {}, el("h4", {}, column), captioner ? el("p.soft.small", {}, captioner) : "", body);
  });
  return section("Captions", cards.length ? el("div.captions", {}, ...cards) : el("p.soft", {}, "none"));
}

function scores(sample) {
  const rows = sample.scores.map(({ name, value, percentile }) => {
    const known = percentile !== null && percentile !== undefined;
    const said = known ? `above ${number(Math.round(percentile))}% of the corpus` : "no percentile";
    const bar = el("span.bar", { role: "img", "aria-label": said, title: said }, el("i.fill", { style: { width: `${known ? percentile : 0}%` } }));
    return el("li", {}, el("span", {}, name), el("b", {}, value === null ? "—" : number(value)), bar, el("span.soft.small", {}, known ? `${Math.round(percentile)}%` : ""));
  });
  return rows.length ? section("Scores", el("ul.scores", {}, ...rows)) : "";
}

/** Show what a latents column's autoencoder gives back, once asked. */
function latents(sample) {
  const figures = sample.latents.map((column) => {
    const figure = el("figure", {}, el("button", { onclick: show }, `Decode ${column}`));
    function show() {
      const drawn = el("img", { alt: `What ${column} decodes to`, src: decoded(sample, column) });
      const said = el("figcaption", {}, `${column} …`);
      drawn.addEventListener("load", () => (said.textContent = `${column}, decoded: ${drawn.naturalWidth} × ${drawn.naturalHeight}`));
      drawn.addEventListener("error", async () => {
        const why = await fetch(drawn.src).then((response) => response.json()).catch(() => ({}));
        figure.replaceChildren(el("p.soft", {}, why.error ?? `${column} cannot be decoded here.`));
      });
      figure.replaceChildren(drawn, said);
    }
    return figure;
  });
  return figures.length ? el("div.latents", {}, ...figures) : "";
}

function belongs(sample) {
  const groups = sample.groups.map(({ kind, id, rows, kept, where }) => {
    const said = `${kind} group ${id}, ${many(rows, "picture")}`;
    return el("li", {}, where ? el("a", { href: link({ view: "grid", where }) }, said) : said, el(kept ? "span.tag.keep" : "span.tag", {}, kept ? "kept" : "not kept"));
  });
  const selections = sample.selections.map(({ name, chosen, why }) =>
    el("li", {}, el("span", {}, name), el(chosen ? "span.tag.keep" : "span.tag", {}, chosen ? "chosen" : "not chosen"), why ? el("p.mono.small.soft", {}, why) : ""),
  );
  const failures = sample.failures.map(({ column, reason }) => el("li", {}, column, el("span.tag.drop", {}, reason)));
  const list = (title, items) => (items.length ? section(title, el("ul.lines", {}, ...items)) : "");
  return [list("Failed in", failures), list("Groups", groups), list("Selections", selections)];
}

/** The form that marks a picture; `mark(name, note)` carries it out. */
export function marking(sample, corpus, mark) {
  const now = sample.mark;
  const note = el("input", { id: "note", type: "text", maxlength: 500, value: now?.note ?? "", placeholder: "A note, if you like", "aria-label": "Note", autocomplete: "off" });
  note.addEventListener("keydown", (event) => event.key === "Enter" && mark(now?.mark ?? "keep", note.value));
  const button = (name, text, key) => el(`button.${name}`, { "aria-pressed": String(now?.mark === name), disabled: corpus.read_only, onclick: () => mark(name, note.value) }, text, el("kbd", {}, key));
  const undo = el("button.link", { disabled: corpus.read_only || !now, onclick: () => mark(null, "") }, "Undo", el("kbd", {}, "u"));
  const said = corpus.read_only ? "This page may only read." : now ? `Marked ${now.mark} by ${now.who}, ${new Date(now.when).toLocaleString()}` : "Not marked yet.";
  return el("div.marking", { role: "group", "aria-label": "Mark" }, button("keep", "Keep ", "k"), button("drop", "Drop ", "d"), undo, note, el("p.soft.small", { role: "status" }, said));
}

/** Draw a picture's view; gives what is needed to draw it again. */
export async function showSample(root, { row, corpus, words, neighbours, mark, signal }) {
  const sample = await get("sample", named(row), signal);
  const step = (other, text, name) => el("a.button", { href: other && place(other), role: "link", "aria-label": name, "aria-disabled": other ? null : "true" }, text);
  const title = el("div.sample-head", {},
    el("a.button", { href: link({ view: "grid" }) }, "← Pictures"),
    el("h2", { tabindex: -1, id: "sample-title" }, el("span.soft", {}, `${sample.source} / `), sample.key),
    el("span.spring"),
    step(neighbours.before, "‹", "The picture before"),
    step(neighbours.after, "›", "The picture after"),
  );
  const failed = sample.failures.some(({ column }) => column === "images");
  const alt = sample.captions.find(({ text }) => text)?.text ?? `${sample.source}/${sample.key}`;
  const full = el("a.whole", { href: picture(row, Infinity), target: "_blank", rel: "noopener", "aria-label": "The picture in full size" }, image(row, Infinity, alt));
  const size = sample.width ? el("p.soft.small", {}, `${count(sample.width)} × ${count(sample.height)} pixels`) : "";
  const like = corpus.embeddings.length && !failed ? el("a.button", { href: link({ view: "grid", like: `${row.source}/${row.key}` }) }, "More like this") : "";
  const left = el("div.sample-left", {}, failed ? el("div.whole", {}, el("span.absent", {}, "no picture")) : full, el("div.sample-under", {}, size, el("span.spring"), like), marking(sample, corpus, mark), latents(sample));
  const right = el("div.sample-right", {}, captions(sample, words), scores(sample), ...belongs(sample), section("Provenance", facts(sample.provenance)), section("Fields", facts(sample.fields)));
  root.replaceChildren(title, el("div.sample", {}, left, right));
  return sample;
}
