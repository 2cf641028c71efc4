/** An endless grid of pictures: pages by cursor, rows of even height, and only what can be seen in the document. */

import { picture } from "./api.js";
import { byId, el, many } from "./dom.js";
import { link } from "./state.js";

const [GAP, CAPTION] = [10, 24];

/** Name a picture to those who hear the page. */
const spoken = (row) => `${row.caption || "no caption"} (${row.source}/${row.key})${row.mark ? `, marked ${row.mark}` : ""}`;

/** Give the link to a picture's view; its shard and row let the server find it at once. */
export const place = ({ source, key, shard, row }) => link({ view: "sample", source, key, shard: shard ?? null, row: row ?? null });

/** Make an image, or what stands for one that is not there: rows that failed have no width. */
export function image(row, pixels, alt = "") {
  if (row.width === null) return el("span.absent", {}, "no picture");
  const node = el("img", { src: picture(row, pixels), alt, decoding: "async", draggable: "false" });
  node.addEventListener("error", () => node.replaceWith(el("span.absent", {}, "no picture")));
  return node;
}

export class Grid {
  constructor(scroller, list, { onMark, onPlace }) {
    Object.assign(this, { scroller, list, onMark, onPlace, items: [], lines: [], tiles: new Map(), current: 0, serial: 0 });
    scroller.addEventListener("scroll", () => this.soon(), { passive: true });
    new ResizeObserver(() => this.resized()).observe(list);
    list.addEventListener("keydown", (event) => this.key(event));
    list.addEventListener("focusin", (event) => {
      const tile = event.target.closest("li");
      if (tile) this.current = Number(tile.dataset.index);
    });
  }

  /** Show a list from its beginning; `load(cursor)` gives {rows, next, previous}. */
  async show(load, from = null) {
    this.serial += 1;
    Object.assign(this, { load, items: [], lines: [], pages: [], next: null, previous: null, done: false, loading: false, current: 0 });
    for (const tile of this.tiles.values()) tile.remove();
    this.tiles.clear();
    this.list.style.height = "0";
    byId("earlier").hidden = true;
    this.scroller.scrollTop = 0;
    await this.more(from);
  }

  async more(cursor = this.next) {
    if (this.loading || this.done) return;
    const serial = this.serial;
    this.loading = true;
    this.say("Loading …");
    try {
      const found = await this.load({ after: cursor });
      if (serial !== this.serial) return;
      if (!this.items.length) this.previous = found.previous;
      this.pages.push({ first: this.items.length, cursor });
      this.items.push(...found.rows);
      this.next = found.next;
      this.done = !found.next;
      this.loading = false;
      byId("earlier").hidden = !this.previous;
      this.layout();
      this.say(this.done ? (this.items.length ? `That is all: ${many(this.items.length, "picture")}.` : "Nothing is left by this filter.") : "");
    } catch (error) {
      if (serial !== this.serial) return;
      this.loading = false;
      this.done = true;
      this.say(error.name === "AbortError" || error.status === 400 ? "" : `The pictures cannot be had: ${error.message}`);
    }
  }

  /** Put the pages before the first one, which a URL left out. */
  async earlier() {
    const serial = this.serial;
    const found = await this.load({ before: this.previous });
    if (serial !== this.serial) return;
    const { length } = found.rows;
    for (const page of this.pages) page.first += length;
    this.pages.unshift({ first: 0, cursor: found.previous });
    this.items.unshift(...found.rows);
    this.previous = found.previous;
    byId("earlier").hidden = !this.previous;
    for (const tile of this.tiles.values()) tile.remove();
    this.tiles.clear();
    this.lines = [];
    this.layout();
    const line = this.lines.find(({ to }) => to > length);
    this.scroller.scrollTop += line ? line.top : 0;
  }

  say(text) {
    byId("grid-end").textContent = text;
    this.list.setAttribute("aria-busy", String(this.loading));
  }

  resized() {
    if (this.list.clientWidth === this.width || !this.list.clientWidth) return this.soon();
    const top = this.lines.find(({ top, height }) => top + height > this.scroller.scrollTop - this.list.offsetTop);
    const moved = this.width !== undefined && top && this.scroller.scrollTop > this.list.offsetTop;
    this.lines = [];
    this.layout();
    if (moved) this.reveal(top.from, true);
  }

  /** Fill lines with pictures in their own shapes; what is laid out already stays. */
  layout() {
    this.width = this.list.clientWidth;
    if (!this.width) return;
    const height = this.width < 600 ? 112 : this.width < 1500 ? 168 : 208;
    const kept = this.lines.length && this.lines.at(-1).loose ? this.lines.pop() : null;
    let from = kept?.from ?? this.lines.at(-1)?.to ?? 0;
    let top = kept?.top ?? (this.lines.length ? this.lines.at(-1).top + this.lines.at(-1).height + GAP : 0);
    let [line, sum] = [[], 0];
    const close = (tall, loose) => {
      let left = 0;
      const boxes = line.map((ratio) => ({ left, width: ratio * tall, x: (left += ratio * tall + GAP) }));
      this.lines.push({ from, to: from + line.length, top, height: tall + CAPTION, tall, boxes, loose });
      from += line.length;
      top += tall + CAPTION + GAP;
      [line, sum] = [[], 0];
    };
    for (let i = from; i < this.items.length; i += 1) {
      const { width, height: tall } = this.items[i];
      const ratio = width && tall ? Math.min(Math.max(width / tall, 0.5), 2.4) : 1;
      line.push(ratio);
      sum += ratio;
      if (sum * height + GAP * (line.length - 1) >= this.width) close((this.width - GAP * (line.length - 1)) / sum, false);
    }
    if (line.length) close(height, true);
    this.list.style.height = `${Math.max(top - GAP, 0)}px`;
    this.render();
  }

  soon() {
    this.frame ??= requestAnimationFrame(() => ((this.frame = null), this.render()));
  }

  /** The line at a height, by halving. */
  lineAt(y) {
    let [low, high] = [0, this.lines.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.lines[middle].top <= y) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  /** Have the tiles in the document that are within a screen of what is seen, and no others. */
  render() {
    if (!this.list.offsetParent || !this.lines.length) return;
    const screen = this.scroller.clientHeight;
    const top = this.scroller.scrollTop - this.list.offsetTop;
    const wanted = new Set();
    for (let n = this.lineAt(top - screen * 0.7); n < this.lines.length && this.lines[n].top < top + screen * 1.7; n += 1) {
      const line = this.lines[n];
      for (let i = line.from; i < line.to; i += 1) {
        wanted.add(i);
        this.place(i, line);
      }
    }
    for (const [i, tile] of this.tiles) {
      if (wanted.has(i) || tile.contains(document.activeElement)) continue;
      tile.querySelector("img")?.removeAttribute("src"); // what has not come yet need not come
      tile.remove();
      this.tiles.delete(i);
    }
    for (const [i, tile] of this.tiles) tile.firstChild.tabIndex = i === this.stop(wanted) ? 0 : -1;
    const first = this.lines[this.lineAt(top)].from;
    this.onPlace(top < 40 ? null : (this.pages.findLast(({ first: begin }) => begin <= first)?.cursor ?? null));
    if (this.list.offsetTop + this.list.clientHeight < this.scroller.scrollTop + 3 * screen) this.more();
  }

  /** The one tile that the tabulator key stops at. */
  stop(wanted) {
    return this.tiles.has(this.current) ? this.current : Math.min(...wanted);
  }

  place(i, line) {
    const { left, width } = line.boxes[i - line.from];
    let tile = this.tiles.get(i);
    if (!tile) {
      tile = this.tile(i, Math.max(width, line.tall));
      this.tiles.set(i, tile);
      const next = [...this.tiles.keys()].filter((other) => other > i);
      this.list.insertBefore(tile, next.length ? this.tiles.get(Math.min(...next)) : null);
    }
    const { style } = tile;
    style.transform = `translate(${left}px, ${line.top}px)`;
    style.width = `${width}px`;
    style.setProperty("--tall", `${line.tall}px`);
  }

  tile(i, pixels) {
    const row = this.items[i];
    const caption = el("span.cap", { "aria-hidden": "true" }, row.score === undefined ? "" : el("b", {}, row.score.toFixed(2)), row.caption ?? "");
    const anchor = el("a", { href: place(row), "aria-label": spoken(row), title: row.caption || null }, el("span.frame", {}, image(row, pixels)), caption);
    const tile = el("li", { "data-index": i, "aria-posinset": i + 1, "aria-setsize": this.done ? this.items.length : -1 }, anchor);
    tile.classList.toggle("keep", row.mark === "keep");
    tile.classList.toggle("drop", row.mark === "drop");
    return tile;
  }

  /** Bring a picture into view, and give it the focus. */
  reveal(i, quietly = false) {
    const line = this.lines.find(({ to }) => to > i);
    if (!line) return;
    const [top, screen] = [this.list.offsetTop + line.top, this.scroller.clientHeight];
    const over = quietly ? 0 : byId("query").offsetHeight + 12;
    if (top - over < this.scroller.scrollTop) this.scroller.scrollTop = top - over;
    else if (top + line.height + 12 > this.scroller.scrollTop + screen) this.scroller.scrollTop = top + line.height + 12 - screen;
    this.render();
    if (quietly) return;
    this.current = i;
    this.tiles.get(i)?.firstChild.focus({ preventScroll: true });
    this.render();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = this.items.length - 1;
    const lines = { ArrowUp: -1, ArrowDown: 1, PageUp: -4, PageDown: 4 }[event.key];
    const target = { ArrowLeft: this.current - 1, ArrowRight: this.current + 1, Home: 0, End: last }[event.key] ?? (lines && this.beside(lines));
    if (target === undefined) return;
    event.preventDefault();
    this.reveal(Math.min(Math.max(target, 0), last));
  }

  /** The picture so many lines below, nearest to the one that has the focus. */
  beside(lines) {
    const n = this.lines.findIndex(({ to }) => to > this.current);
    const goal = Math.min(Math.max(n + lines, 0), this.lines.length - 1);
    const middle = (box) => box.left + box.width / 2;
    const x = middle(this.lines[n].boxes[this.current - this.lines[n].from]);
    const away = this.lines[goal].boxes.map((box) => Math.abs(middle(box) - x));
    return this.lines[goal].from + away.indexOf(Math.min(...away));
  }

  indexOf(row) {
    return this.items.findIndex(({ source, key }) => source === row.source && key === row.key);
  }

  /** Show the mark of a picture. */
  marked(row, mark) {
    const i = this.indexOf(row);
    if (i < 0) return;
    this.items[i].mark = mark;
    const tile = this.tiles.get(i);
    if (!tile) return;
    tile.classList.toggle("keep", mark === "keep");
    tile.classList.toggle("drop", mark === "drop");
    tile.firstChild.setAttribute("aria-label", spoken(this.items[i]));
  }
}
