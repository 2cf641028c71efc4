/** The page of microdit explore: it joins the URL, the filters, the grid and the views. */

import { get, named, post, setToken } from "./api.js";
import { byId, copy, count, dialog, el, later, many, shortCount, toast } from "./dom.js";
import { Filters } from "./filters.js";
import { Grid } from "./grid.js";
import { showRuns } from "./runs.js";
import { marking, showSample } from "./sample.js";
import { go, link, note, onChange, state } from "./state.js";
import { liveStatus, showCompare, showFailures, showGroups } from "./views.js";
import { Where } from "./where.js";

const VIEWS = { grid: "Pictures", groups: "Groups", failures: "Failures", compare: "Compare", runs: "Training" };
const KEYS = { "← ↑ → ↓": "go from picture to picture", Enter: "open a picture", Esc: "back to the pictures", "k d": "mark it: keep, drop", u: "undo the mark", "/": "to the SQL field", "s": "to the search", f: "to the filters", "?": "this list" };

let corpus, filters, grid, shownList, sample;
let viewAbort = new AbortController();
let countAbort = new AbortController();
let listAbort = new AbortController();

const apply = () => go({ where: byId("sql").value.trim(), view: "grid" });

/** Make the SQL field as high as its text. */
function fit() {
  const field = byId("sql");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
  byId("apply").hidden = field.value.trim() === state.where;
}

function sqlProblem(message) {
  byId("sql-error").textContent = message;
  byId("sql").setAttribute("aria-invalid", String(Boolean(message)));
}

/** Count the rows of the filter; its errors stand beside the field, and the charts wait for it to be right. */
async function showCount() {
  countAbort.abort();
  countAbort = new AbortController();
  byId("count").textContent = "Counting …";
  try {
    const { rows, of } = await get("count", { where: state.where }, countAbort.signal);
    byId("count").replaceChildren(el("b", {}, count(rows)), rows === of ? " rows" : ` of ${many(of, "row")}`);
    byId("done").textContent = `Show ${many(rows, "row")}`;
    sqlProblem("");
    filters.show(state.where);
  } catch (error) {
    if (error.name === "AbortError") return;
    byId("count").textContent = "";
    sqlProblem(error.message);
  }
}

/** What the grid is to show by the URL: its name, how to load a page, and a word on it. */
function list() {
  const { where, order, seed, like, text } = state;
  if (like) {
    const [source, ...key] = like.split("/");
    return { name: `like ${like}`, load: () => once("similar", { source, key: key.join("/"), limit: 60 }), says: `The pictures most like ${like}` };
  }
  if (text) return { name: `text ${text}`, load: () => once("search", { text, limit: 60 }), says: `The pictures nearest to “${text}”` };
  const chance = order === "random" ? { order, seed: seed ?? "1" } : {};
  return { name: JSON.stringify([where, chance]), load: (cursor) => get("rows", { where, ...chance, ...cursor, limit: 100 }, listAbort.signal), says: order === "random" ? "100 at most, drawn at random" : "" };
}

async function once(path, parameters) {
  const { rows, note } = await get(path, parameters, listAbort.signal);
  if (note) byId("grid-note").append(`, ${note}`);
  return { rows, next: null, previous: null };
}

async function showList() {
  const wanted = list();
  if (shownList === wanted.name) return;
  shownList = wanted.name;
  listAbort.abort();
  listAbort = new AbortController();
  byId("grid-note").hidden = !wanted.says;
  byId("grid-note").replaceChildren(wanted.says ? el("a", { href: link({ like: null, text: null, order: null, seed: null }) }, "× back to all") : "", ` ${wanted.says}`);
  byId("order").textContent = state.order === "random" ? "Random, again" : "In random order";
  await grid.show(wanted.load, state.at ?? null);
}

function showHeader() {
  for (const anchor of byId("views").children) {
    anchor.href = link({ view: anchor.dataset.view });
    const here = state.view === anchor.dataset.view || (state.view === "sample" && anchor.dataset.view === "grid");
    if (here) anchor.setAttribute("aria-current", "page");
    else anchor.removeAttribute("aria-current");
  }
  const words = new Where(state.where, corpus.columns).words();
  const field = byId("words");
  if (document.activeElement !== field) field.value = state.text ?? words.join(" ");
  byId("by").value = state.text || (byId("by").value === "meaning" && corpus.text_search) ? "meaning" : "words";
  byId("clear").hidden = !state.where;
}

/** Show what the URL says. */
async function show(before = null) {
  const { view } = state;
  showHeader();
  if (!before || before.where !== state.where) {
    byId("sql").value = state.where;
    showCount();
  }
  fit();
  const [gridView, pageView] = [byId("grid-view"), byId("page-view")];
  const changed = !before || before.view !== view;
  if (changed && before?.view === "grid") grid.top = byId("main").scrollTop;
  document.body.dataset.view = view;
  document.body.classList.remove("filtering");
  gridView.hidden = view !== "grid";
  pageView.hidden = view === "grid";
  viewAbort.abort();
  viewAbort = new AbortController();
  document.title = `${view === "sample" ? state.key : VIEWS[view]} – ${corpus.name}`;
  if (view === "grid") {
    if (before?.view === "sample") returnTo(before);
    return showList();
  }
  if (changed) byId("main").scrollTop = 0;
  const context = { corpus, signal: viewAbort.signal };
  try {
    if (view === "sample") await drawSample();
    if (view === "failures") await showFailures(pageView, context);
    if (view === "groups") await showGroups(pageView, context);
    if (view === "compare") await showCompare(pageView, context);
    if (view === "runs") await showRuns(pageView, context);
    if (changed && before) pageView.querySelector("h2")?.focus({ preventScroll: true });
  } catch (error) {
    if (error.name !== "AbortError") pageView.replaceChildren(el("p.error", { role: "alert" }, error.message), el("a.button", { href: link({ view: "grid" }) }, "← Pictures"));
  }
}

/** From one picture back to the grid: where it was, the focus on that picture. */
function returnTo(before) {
  byId("main").scrollTop = grid.top ?? 0;
  const i = grid.indexOf(before);
  if (i >= 0) requestAnimationFrame(() => grid.reveal(i));
}

async function drawSample() {
  const row = named(state);
  const i = grid.indexOf(row);
  if (i >= grid.items.length - 3 && i >= 0) grid.more();
  const neighbours = { before: i > 0 ? grid.items[i - 1] : null, after: i >= 0 ? (grid.items[i + 1] ?? null) : null };
  const words = [...new Where(state.where, corpus.columns).words(), ...(state.text ?? "").split(/\s+/)].filter(Boolean);
  const found = await showSample(byId("page-view"), { row, corpus, words, neighbours, mark: (name, text) => mark(row, name, text), signal: viewAbort.signal });
  sample = { ...found, ...neighbours };
}

/** Mark a picture, or take its mark away. */
async function mark(row, name, text = "") {
  if (corpus.read_only) return toast("This page may only read: it was started with --read-only.", { bad: true });
  try {
    const made = await post("marks", { ...named(row), row: row.row === undefined ? undefined : Number(row.row), mark: name, note: text });
    grid.marked(row, name);
    if (state.view === "sample" && state.key === row.key) showMark(row, name ? made : null);
    toast(name ? `Marked ${name}: ${row.key}` : `The mark of ${row.key} is undone.`, name ? { action: "Undo", run: () => mark(row, null) } : {});
  } catch (error) {
    toast(`Not marked: ${error.message}`, { bad: true });
  }
}

/** Show the new mark of the picture that is open; the focus stays where it was. */
function showMark(row, made) {
  const old = document.querySelector(".marking");
  const position = [...old.children].indexOf(document.activeElement);
  sample.mark = made;
  old.replaceWith(marking(sample, corpus, (name, text) => mark(row, name, text)));
  const now = document.querySelector(".marking").children[position];
  if (now) (now.disabled ? document.querySelector(".marking button") : now).focus();
}

const query = () => `SELECT source, shard, row FROM samples${state.where ? ` WHERE ${state.where}` : ""}`;
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
const command = (name) => `microdit select ${quoted(corpus.url ?? corpus.name)} ${name} ${quoted(query())}`;

/** Leave the failed rows out, and ask again for the name. */
async function onlyGood() {
  go({ where: new Where(state.where, corpus.columns).with("status", { values: ["ok"] }) });
  await showCount();
  saveDialog();
}

function saveDialog() {
  const name = el("input", { id: "selection-name", type: "text", required: true, pattern: "[a-z0-9][a-z0-9_\\-]*", autocomplete: "off", placeholder: "clean" });
  const said = el("p", { role: "status" });
  const form = el("form.save", {},
    el("p.soft", {}, byId("count").textContent, state.where ? el("code", {}, state.where) : ", everything"),
    el("label", { for: "selection-name" }, "Name of the selection"), name,
    el("div.row", {}, el("button.primary", { type: "submit", disabled: corpus.read_only }, "Save")), said,
  );
  form.querySelector("button").type = "submit";
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    said.className = "";
    said.textContent = "Saving …";
    try {
      const made = await post("selections", { name: name.value.trim(), where: state.where });
      said.replaceChildren("Saved as ", el("b", {}, made.name), `: ${many(made.rows, "row")}. The same by the command line:`, el("code", {}, command(name.value.trim())));
    } catch (error) {
      said.className = "error";
      said.textContent = error.message;
      if (error.message.includes("status = 'ok'")) said.append(el("button", { onclick: () => onlyGood() }, "Add status = 'ok'"));
    }
  });
  const saved = corpus.selections.length ? el("p.soft.small", {}, `Saved already: ${corpus.selections.map((one) => `${one.name} (${shortCount(one.rows)})`).join(", ")}`) : "";
  dialog("Save as a selection", form, saved);
  name.focus();
}

const help = () => dialog("Keys", el("dl.keys", {}, ...Object.entries(KEYS).flatMap(([key, text]) => [el("dt", {}, ...key.split(" ").map((one) => el("kbd", {}, one))), el("dd", {}, text)])));

function key(event) {
  const typing = event.target.closest("input:not([type=range]), textarea, select");
  if (event.key === "Escape" && !byId("dialog").open) {
    if (byId("live").open) byId("live").open = false;
    else if (document.body.classList.contains("filtering")) document.body.classList.remove("filtering");
    else if (typing) typing.blur();
    else if (state.view !== "grid") go({ view: "grid" });
    else if (state.like || state.text) go({ like: null, text: null });
    return;
  }
  if (typing || byId("dialog").open || event.ctrlKey || event.metaKey || event.altKey) return;
  const row = state.view === "sample" ? sample : state.view === "grid" && event.target.closest?.("#grid li") ? grid.items[grid.current] : null;
  const marks = { k: "keep", d: "drop", u: null };
  if (event.key === "/") byId("sql").focus();
  else if (event.key === "s") byId("words").focus();
  else if (event.key === "f") openFilters();
  else if (event.key === "?") help();
  else if (row && event.key in marks) mark(row, marks[event.key], byId("note")?.value ?? "");
  else if (state.view === "sample" && event.key === "ArrowLeft" && sample?.before) go(named(sample.before), true);
  else if (state.view === "sample" && event.key === "ArrowRight" && sample?.after) go(named(sample.after), true);
  else if (state.view === "grid" && event.key.startsWith("Arrow") && !event.target.closest("#grid, #facets, summary")) grid.reveal(grid.current);
  else return;
  event.preventDefault();
}

/** A finger's stroke over one picture goes to its neighbour. */
function swipes(root) {
  let from = null;
  root.addEventListener("touchstart", (event) => (from = event.touches.length === 1 ? event.touches[0] : null), { passive: true });
  root.addEventListener("touchend", (event) => {
    const to = event.changedTouches[0];
    if (!from || state.view !== "sample" || Math.abs(to.clientX - from.clientX) < 70 || Math.abs(to.clientY - from.clientY) > 50) return;
    const row = to.clientX < from.clientX ? sample?.after : sample?.before;
    if (row) go(named(row), true);
  });
}

function openFilters() {
  document.body.classList.add("filtering");
  byId("filters").querySelector("button:not([hidden]), input")?.focus();
}

function search(event) {
  event.preventDefault();
  const text = byId("words").value.trim();
  if (byId("by").value === "meaning") return go({ view: "grid", text: text || null });
  go({ view: "grid", where: new Where(state.where, corpus.columns).withWord(text) });
}

/** Listen to what a build says while the page can be seen: a browser has only six connections to a server. */
function watchBuild() {
  let events = null;
  const listen = () => {
    events?.close();
    events = document.hidden ? null : new EventSource("/api/events");
    events?.addEventListener("message", (event) => {
      const status = JSON.parse(event.data);
      if (status.type === "status") liveStatus(byId("live"), status);
    });
  };
  listen();
  document.addEventListener("visibilitychange", listen);
  addEventListener("pagehide", () => events?.close());
}

function listen() {
  onChange(show);
  addEventListener("keydown", key);
  byId("skip").addEventListener("click", () => (grid.items.length && state.view === "grid" ? grid.reveal(grid.current) : byId("main").focus()));
  byId("search").addEventListener("submit", search);
  byId("sql-form").addEventListener("submit", (event) => (event.preventDefault(), apply()));
  byId("sql").addEventListener("input", fit);
  byId("sql").addEventListener("keydown", (event) => event.key === "Enter" && !event.shiftKey && (event.preventDefault(), apply()));
  byId("clear").addEventListener("click", () => go({ where: "" }));
  byId("order").addEventListener("click", () => go({ view: "grid", order: "random", seed: String(Math.floor(Math.random() * 1e6)) }));
  byId("copy").addEventListener("click", () => copy(command("NAME"), "The command"));
  byId("save").addEventListener("click", saveDialog);
  byId("keys").addEventListener("click", help);
  byId("open-filters").addEventListener("click", openFilters);
  byId("done").addEventListener("click", () => document.body.classList.remove("filtering"));
  byId("earlier").addEventListener("click", () => grid.earlier());
  swipes(byId("page-view"));
}

async function begin() {
  corpus = await get("corpus");
  setToken(corpus.token);
  byId("name").textContent = corpus.name;
  byId("size").textContent = `${shortCount(corpus.rows)} rows from ${many(corpus.sources.length, "source")}`;
  byId("by").parentElement.hidden = !corpus.text_search;
  byId("views").append(...Object.entries(VIEWS).map(([view, text]) => el("a", { "data-view": view, href: "#" }, text)));
  if (corpus.notes?.length) byId("query").append(el("p.note.warn", {}, `Not all can be read: ${corpus.notes.slice(0, 3).join("; ")}`));
  filters = new Filters(corpus.columns, (where) => go({ where, view: state.view === "sample" ? "grid" : state.view }));
  const placed = later((at) => state.view === "grid" && (state.at ?? null) !== at && note({ at }), 400);
  grid = new Grid(byId("main"), byId("grid"), { onPlace: placed });
  listen();
  watchBuild();
  await show();
}

begin().catch((error) => byId("main").replaceChildren(el("p.error", { role: "alert" }, error.message)));
