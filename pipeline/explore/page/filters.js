/** The filter panel: a histogram or bars for each column; each shows what all other filters leave. */

import { get, queue } from "./api.js";
import { byId, count, el, number, shortCount, svg } from "./dom.js";
import { Where } from "./where.js";

const [WIDTH, HEIGHT, FEW] = [280, 56, 7];

/** Make the bars of a histogram over all rows (pale) and over those that are left; all are equally wide. */
export function bars(whole, left, height = HEIGHT, kind = "fill") {
  const drawn = [];
  for (const [data, style] of [[whole, "ghost"], [left, kind]]) {
    const most = Math.max(...(data?.counts ?? []), 1);
    const wide = WIDTH / (data?.counts.length ?? 1);
    data?.counts.forEach((rows, i) => {
      const tall = Math.max(1.5, (rows / most) * (height - 2));
      if (rows) drawn.push(svg("rect", { class: style, x: i * wide + 0.4, y: height - tall, width: wide - 0.8, height: tall }));
    });
  }
  return drawn;
}

class Facet {
  constructor(panel, column) {
    Object.assign(this, { panel, column, stale: true, seen: false, whole: null, all: false });
    this.readout = el("span.readout");
    this.reset = el("button.link", { hidden: true, "aria-label": `Take away the filter of ${column.label}`, onclick: () => this.set(null) }, "clear");
    this.chart = el("div.chart", {}, el("p.soft", {}, "…"));
    const title = el("h4", { title: column.name }, column.label);
    this.root = el(`section.facet.${column.kind}`, { "data-column": column.name, "aria-label": column.label }, el("div.facet-head", {}, title, this.readout, this.reset), this.chart);
  }

  set(filter) {
    this.panel.change(this.panel.where.with(this.column.name, filter));
  }

  /** Ask for what the other filters leave, and draw it. */
  async load(signal) {
    const { name } = this.column;
    const others = this.panel.where.with(name, null);
    this.stale = false;
    try {
      this.whole ??= await get("histogram", { column: name }, signal);
      this.left = others ? await get("histogram", { column: name, where: others }, signal) : this.whole;
      this.draw();
    } catch (error) {
      this.stale = true;
      if (error.name !== "AbortError") this.chart.replaceChildren(el("p.soft", {}, error.message));
    }
  }

  draw() {
    const filter = this.panel.where.filter(this.column.name);
    this.reset.hidden = !filter;
    this.root.classList.toggle("active", Boolean(filter));
    if (!this.left) return;
    this.about = this.left.estimated ? "≈ " : "";
    if (this.left.kind === "bins") this.drawBins(filter);
    else this.drawValues(filter);
  }

  drawBins(filter) {
    const { edges } = this.whole;
    if (edges.length < 2) return this.chart.replaceChildren(el("p.soft", {}, "no values"));
    if (edges.length === 2 && !filter) return this.chart.replaceChildren(el("p.soft.small", {}, `${number(edges[0])} everywhere`));
    this.low = edges[0];
    this.high = edges[edges.length - 1];
    const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "histogram", "aria-hidden": "true" });
    picture.append(...bars(this.whole, this.left));
    this.brush = svg("rect", { class: "brush", y: 0, height: HEIGHT, width: 0, "data-brush": "" });
    picture.append(this.brush);
    this.showBrush(filter?.low ?? this.low, filter?.high ?? this.high, Boolean(filter));
    this.listen(picture);
    const label = this.column.label;
    const field = (what, value, hint) => el("input", { type: "text", inputmode: "decimal", value: value ?? "", placeholder: number(hint), "aria-label": `${label} ${what}`, onchange: () => this.typed() });
    this.from = field("from", filter?.low, this.low);
    this.to = field("to", filter?.high, this.high);
    const none = this.left.nulls ? el("span.nulls", { title: "rows without a value" }, `${shortCount(this.left.nulls)} without`) : null;
    const focused = this.chart.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    this.chart.replaceChildren(picture, el("div.ends", {}, this.from, none, this.to));
    if (focused) this.chart.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  }

  typed() {
    const value = (input) => (input.value.trim() === "" || Number.isNaN(Number(input.value)) ? undefined : Number(input.value));
    const [low, high] = [value(this.from), value(this.to)];
    this.set(low === undefined && high === undefined ? null : { low, high, closed: true });
  }

  showBrush(low, high, shown = true) {
    const { edges } = this.whole;
    const x = (value) => {
      const i = Math.min(Math.max(edges.findIndex((edge) => edge > value) - 1, value < this.low ? 0 : value >= this.high ? edges.length - 2 : 0), edges.length - 2);
      const part = (value - edges[i]) / (edges[i + 1] - edges[i] || 1);
      return ((i + Math.min(Math.max(part, 0), 1)) / (edges.length - 1)) * WIDTH;
    };
    this.brush.setAttribute("x", x(low));
    this.brush.setAttribute("width", shown ? Math.max(x(high) - x(low), 1) : 0);
  }

  /** Drag over bars, or click one, to keep their values; Escape while dragging lets go. */
  listen(picture) {
    const { edges } = this.whole;
    const counts = this.left.counts;
    const bin = (event) => {
      const box = picture.getBoundingClientRect();
      const part = (event.clientX - box.left) / box.width;
      return Math.min(Math.max(Math.floor(part * (edges.length - 1)), 0), edges.length - 2);
    };
    const spoken = (a, b) => `${number(edges[a])} – ${number(edges[b + 1])}: ${this.about}${count(counts.slice(a, b + 1).reduce((sum, rows) => sum + rows, 0))}`;
    let begun = null;
    const stop = () => {
      begun = null;
      removeEventListener("keydown", escape);
    };
    const escape = (event) => event.key === "Escape" && (event.stopPropagation(), stop(), this.draw());
    picture.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      begun = bin(event);
      picture.setPointerCapture(event.pointerId);
      addEventListener("keydown", escape);
    });
    picture.addEventListener("pointermove", (event) => {
      const at = bin(event);
      const [a, b] = begun === null ? [at, at] : [Math.min(begun, at), Math.max(begun, at)];
      this.readout.textContent = spoken(a, b);
      if (begun !== null) this.showBrush(edges[a], edges[b + 1]);
    });
    picture.addEventListener("pointerup", (event) => {
      if (begun === null) return;
      const at = bin(event);
      const [a, b] = [Math.min(begun, at), Math.max(begun, at)];
      stop();
      const low = a === 0 ? undefined : edges[a];
      const high = b === edges.length - 2 ? undefined : edges[b + 1];
      this.set(low === undefined && high === undefined ? null : { low, high });
    });
    picture.addEventListener("pointercancel", () => (stop(), this.draw()));
    picture.addEventListener("pointerleave", () => (this.readout.textContent = ""));
  }

  drawValues(filter) {
    const left = new Map(this.left.values.map(({ value, rows }) => [String(value), rows]));
    const entries = this.whole.values.map(({ value, rows }) => ({ value, whole: rows, rows: left.get(String(value)) ?? 0 }));
    const known = new Set(entries.map(({ value }) => String(value)));
    const extra = [...this.left.values, ...(filter?.values ?? []).map((value) => ({ value, rows: 0 }))];
    for (const { value, rows } of extra) {
      if (known.has(String(value))) continue;
      known.add(String(value));
      entries.push({ value, whole: rows, rows });
    }
    if (this.whole.nulls) entries.push({ value: null, whole: this.whole.nulls, rows: this.left.nulls });
    const most = Math.max(...entries.map(({ whole }) => whole), 1);
    const chosen = (value) => (value === null ? Boolean(filter?.empty) : Boolean(filter?.values?.map(String).includes(String(value))));
    const shown = this.all ? entries : entries.filter(({ value }, i) => i < FEW || chosen(value));
    const rows = shown.map(({ value, whole, rows }) => this.valueRow(value, whole / most, rows / most, rows, chosen(value), filter));
    const focused = this.chart.contains(document.activeElement) ? document.activeElement.dataset.value : null;
    const rest = entries.length - shown.length;
    const more = rest > 0 ? el("button.link", { onclick: () => ((this.all = true), this.draw()) }, `${rest} more`) : null;
    const others = !rest && this.left.others ? el("p.soft", {}, `and ${count(this.left.others)} rows with other values`) : null;
    this.chart.replaceChildren(el("ul.values", {}, ...rows), more ?? "", others ?? "");
    if (focused) [...this.chart.querySelectorAll("button")].find((button) => button.dataset.value === focused)?.focus();
  }

  valueRow(value, whole, part, rows, pressed, filter) {
    const text = value === null ? "none" : value === true ? "yes" : value === false ? "no" : value === "" ? "empty" : String(value);
    const bar = el("span.bar", { "aria-hidden": "true" }, el("i.ghost", { style: { width: `${whole * 100}%` } }), el("i.fill", { style: { width: `${Math.min(part, 1) * 100}%` } }));
    const toggle = () => {
      const values = (filter?.values ?? []).filter((other) => String(other) !== String(value));
      if (value !== null && !pressed) values.push(value);
      const empty = value === null ? !pressed : Boolean(filter?.empty);
      this.set(values.length || empty ? { values, ...(empty && { empty }) } : null);
    };
    const parts = [el(value === null ? "span.value.soft" : "span.value", {}, text), el("span.rows", {}, this.about, shortCount(rows)), bar];
    return el("li", {}, el("button", { "aria-pressed": String(pressed), "data-value": String(value), onclick: toggle }, ...parts));
  }
}

export class Filters {
  /** change: what to do with the SQL of a new condition. */
  constructor(columns, change) {
    Object.assign(this, { columns, change, where: new Where("", columns), abort: null });
    const groups = Map.groupBy ? Map.groupBy(columns, ({ group }) => group) : columns.reduce((all, one) => all.set(one.group, [...(all.get(one.group) ?? []), one]), new Map());
    this.facets = [];
    this.watch = new IntersectionObserver((entries) => this.sighted(entries), { root: byId("facets"), rootMargin: "300px" });
    for (const [group, members] of groups) {
      const facets = members.filter(({ kind, name }) => kind !== "text" && name !== "row").map((column) => new Facet(this, column));
      if (!facets.length) continue;
      byId("facets").append(el("h3.group", {}, group), ...facets.map(({ root }) => root));
      this.facets.push(...facets);
    }
    for (const facet of this.facets) this.watch.observe(facet.root);
  }

  sighted(entries) {
    for (const entry of entries) this.facets.find(({ root }) => root === entry.target).seen = entry.isIntersecting;
    this.load();
  }

  /** Show a condition: mark what it filters, and renew the charts that can be seen. */
  show(sql) {
    this.abort?.abort();
    this.abort = new AbortController();
    this.add = queue();
    this.where = new Where(sql, this.columns);
    for (const facet of this.facets) {
      facet.stale = true;
      facet.draw();
    }
    this.load();
  }

  load() {
    if (!this.abort) return;
    const { signal } = this.abort;
    for (const facet of this.facets) {
      if (!facet.seen || !facet.stale) continue;
      facet.stale = false;
      this.add(() => (signal.aborted ? Promise.resolve() : facet.load(signal)));
    }
  }
}
