/** What failed and why, groups of near pictures, and two filters beside each other. */

import { get } from "./api.js";
import { bars } from "./filters.js";
import { count, el, many, number, shortCount, svg } from "./dom.js";
import { image, place } from "./grid.js";
import { go, link, state } from "./state.js";

const heading = (title, ...says) => el("header.view-head", {}, el("h2", { tabindex: -1 }, title), says.length ? el("p.soft", {}, ...says) : "");

/** A thumbnail that leads to its picture. */
function thumb(row, { kept = false, picture = true, says = "" } = {}) {
  const frame = el("span.frame", {}, picture ? image(row, 160) : el("span.absent", {}, "no picture"));
  const name = `${row.source}/${row.key}${kept ? ", kept" : ""}${row.caption ? `: ${row.caption}` : ""}`;
  return el(kept ? "a.thumb.kept" : "a.thumb", { href: place(row), "aria-label": name, title: row.caption ?? row.key }, frame, kept ? el("span.tag.keep", {}, "kept") : "", says);
}

/** A list that gets its next page when its end comes near; `load(cursor)` gives {next, nodes}. */
async function endless(list, load, signal) {
  const end = el("p.end", { role: "status" }, "Loading …");
  list.after(end);
  let [next, loading] = [null, false];
  const watch = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && more(), { rootMargin: "600px" });
  signal.addEventListener("abort", () => watch.disconnect());
  async function more() {
    if (loading) return;
    loading = true;
    try {
      const found = await load(next);
      if (signal.aborted) return;
      list.append(...found.nodes);
      next = found.next;
      end.textContent = next || list.childElementCount ? "" : (found.note ?? "There are none.");
      if (!next) watch.disconnect();
      else setTimeout(() => ((loading = false), watch.unobserve(end), watch.observe(end)));
    } catch (error) {
      if (error.name === "AbortError") return;
      end.textContent = error.message;
      watch.disconnect();
    }
  }
  watch.observe(end);
}

export async function showFailures(root, { signal }) {
  const { column, reason, where } = state;
  if (reason) {
    const list = el("ul.failed");
    root.replaceChildren(heading(reason, el("a", { href: link({ column: null, reason: null }) }, "All reasons"), ` · in ${column}`), list);
    const row = (one) => el("li", {}, thumb(one, { picture: one.picture }), el("div", {}, el("p", {}, el("a", { href: place(one) }, `${one.source}/${one.key}`)), el("p.mono.small", {}, one.detail || "no detail")));
    return endless(list, async (after) => {
      const found = await get("failures", { column, reason, after, limit: 60 }, signal);
      return { next: found.next, nodes: found.rows.map(row) };
    }, signal);
  }
  const { reasons } = await get("failures", { where }, signal);
  const most = Math.max(...reasons.map(({ rows }) => rows), 1);
  const columns = [...new Set(reasons.map((one) => one.column))];
  const line = (one) => el("li", {}, el("a", { href: link({ column: one.column, reason: one.reason }) }, el("span.value", {}, one.reason), el("span.rows", {}, count(one.rows)), el("span.bar", { "aria-hidden": "true" }, el("i.drop", { style: { width: `${(one.rows / most) * 100}%` } }))));
  const cards = columns.map((name) => el("section.card", { "aria-label": name }, el("h3", {}, name), el("ul.reasons", {}, ...reasons.filter((one) => one.column === name).map(line))));
  const total = reasons.reduce((sum, { rows }) => sum + rows, 0);
  root.replaceChildren(heading("What failed, and why", total ? `${many(total, "row")} in ${many(columns.length, "column")}${where ? ", within the filter" : ""}.` : "Nothing has failed."), el("div.cards", {}, ...cards));
}

const KINDS = { duplicates: "Duplicates", semantic: "Alike in meaning", contaminated: "In an evaluation set" };

export async function showGroups(root, { signal }) {
  const kind = state.kind in KINDS ? state.kind : "duplicates";
  const tabs = Object.entries(KINDS).map(([name, text]) => el("a", { href: link({ kind: name }), "aria-current": name === kind ? "page" : null }, text));
  const list = el("ul.groups");
  root.replaceChildren(heading("Groups of pictures", "Pictures that are the same, or nearly; the one that is kept has a frame."), el("nav.tabs", { "aria-label": "Kinds of groups" }, ...tabs), list);
  const card = ({ id, rows, count: all }) => el("li.card", {}, el("p.soft.small", {}, `group ${id} · ${many(all ?? rows.length, "picture")}`), el("div.thumbs", {}, ...rows.map((row) => thumb(row, { kept: row.kept }))));
  return endless(list, async (after) => {
    const found = await get("groups", { kind, after, limit: 24, where: state.where }, signal);
    return { next: found.next, nodes: found.groups.map(card), note: found.note };
  }, signal);
}

/** Two histograms over each other, or the shares of values side by side. */
function chart(column, whole, a, b) {
  if (whole.kind === "bins") {
    const [low, high] = [whole.edges[0], whole.edges.at(-1)];
    const picture = svg("svg", { viewBox: "0 0 280 72", preserveAspectRatio: "none", class: "histogram", role: "img", "aria-label": `${column.label}: A and B` });
    picture.append(...bars(null, a, 72, "a"), ...bars(null, b, 72, "b"));
    return [picture, el("div.ends", {}, el("span", {}, number(low)), el("span", {}, number(high)))];
  }
  const share = (data, value) => {
    const all = data.values.reduce((sum, { rows }) => sum + rows, data.nulls + (data.others ?? 0)) || 1;
    return ((data.values.find((one) => one.value === value)?.rows ?? 0) / all) * 100;
  };
  const line = ({ value }) => el("li", {}, el("span.value", {}, String(value)), el("span.rows", {}, `${number(Math.round(share(a, value)))} / ${number(Math.round(share(b, value)))}%`), el("span.bar", { "aria-hidden": "true" }, el("i.a", { style: { width: `${share(a, value)}%` } }), el("i.b", { style: { width: `${share(b, value)}%` } })));
  return [el("ul.values", {}, ...whole.values.slice(0, 6).map(line))];
}

export async function showCompare(root, { corpus, signal }) {
  const a = state.a ?? state.where;
  const b = state.b ?? "";
  const field = (name, value) => el("label", {}, el("b", { class: `letter ${name}` }, name.toUpperCase()), el("textarea.mono", { id: `compare-${name}`, rows: 2, spellcheck: "false", placeholder: "everything", "aria-label": `Filter ${name.toUpperCase()}` }, value));
  const fields = { a: field("a", a), b: field("b", b) };
  const error = el("p.error", { role: "alert" });
  const values = () => ({ a: fields.a.lastChild.value.trim(), b: fields.b.lastChild.value.trim() || null });
  const form = el("form.compare", {}, fields.a, fields.b, el("button.primary", { type: "submit" }, "Compare"));
  form.addEventListener("submit", (event) => (event.preventDefault(), go(values())));
  form.addEventListener("keydown", (event) => event.key === "Enter" && !event.shiftKey && event.target.matches("textarea") && (event.preventDefault(), go(values())));
  form.querySelector("button").type = "submit";
  const body = el("div");
  root.replaceChildren(heading("Compare two filters", "Each is a condition of SQL; an empty one is everything."), form, error, body);
  let found;
  try {
    found = await get("compare", { a, b, seed: state.seed ?? "1" }, signal);
  } catch (problem) {
    if (problem.name !== "AbortError") error.textContent = problem.message;
    return;
  }
  const tile = (name, rows, says) => el("div.figure", {}, name, el("strong", {}, count(rows)), el("span.soft.small", {}, says));
  const letter = (name) => el("b", { class: `letter ${name}` }, name.toUpperCase());
  const side = (name, where) => el("section.side", { "aria-label": `Pictures of ${name.toUpperCase()}` }, el("h3", {}, letter(name), ` 32 of ${count(found[name].rows)} `, el("a", { href: link({ view: "grid", where }) }, "show all")), el("div.thumbs", {}, ...found[name].sample.map((row) => thumb(row))));
  const charts = el("div.charts");
  body.replaceChildren(
    el("div.figures", {}, tile(letter("a"), found.a.rows, "rows"), tile(letter("b"), found.b.rows, "rows"), tile(el("b.letter", {}, "A∩B"), found.both, "in both")),
    el("div.sides", {}, side("a", a), side("b", b)),
    el("p.below", {}, el("a", { href: link({ seed: String(Number(state.seed ?? 1) + 1) }) }, "Other pictures")),
    el("h3", {}, "By column"), charts,
  );
  for (const column of corpus.columns.filter(({ kind, name }) => kind !== "text" && name !== "row")) {
    const [whole, left, right] = await Promise.all(["", a, b].map((where) => get("histogram", { column: column.name, where }, signal)));
    if (whole.kind === "bins" && whole.counts.length < 2) continue;
    charts.append(el("figure.card", {}, el("figcaption", {}, column.label), ...chart(column, whole, left, right)));
  }
}

/** The live status of a build: stages, rates, failures and the newest pictures. */
export function liveStatus(box, status) {
  if (box.hidden && !status.building) return;
  box.hidden = false;
  const rate = status.rate ? ` ${number(Math.round(status.rate))}/s` : "";
  box.classList.toggle("going", Boolean(status.building));
  box.querySelector("summary").replaceChildren(el("i.dot", { "aria-hidden": "true" }), status.building ? `Building${rate}` : "Build has ended");
  const stage = ({ name, done, total, rate, failed }) => el("li", {}, el("span.value", {}, name), el("span.rows", {}, `${count(done ?? 0)}${total ? ` of ${count(total)}` : ""} shards`), el("span.bar", { "aria-hidden": "true" }, el("i.fill", { style: { width: `${total ? Math.min(done / total, 1) * 100 : 0}%` } })), el("span.soft.small", {}, [rate ? `${number(rate)} a second` : "", failed ? `${count(failed)} failed` : ""].filter(Boolean).join(" · ")));
  const newest = (status.newest ?? []).map((row) => thumb(row));
  const rows = status.rows === undefined ? "" : el("p.soft", {}, `${shortCount(status.rows)} rows${status.failed ? `, ${shortCount(status.failed)} failed` : ""}`);
  box.querySelector(".pop").replaceChildren(rows, el("ul.values", {}, ...(status.stages ?? []).map(stage)), newest.length ? el("p.soft.small", {}, "The newest pictures") : "", el("div.thumbs", {}, ...newest), el("button", { onclick: () => location.reload() }, "Load what is new"));
}
