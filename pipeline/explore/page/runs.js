/** Training runs: curves, sheets by step, and samples that were found broken. */

import { get, sheet } from "./api.js";
import { count, el, number, svg } from "./dom.js";
import { place } from "./grid.js";
import { link, note, state } from "./state.js";

const [WIDTH, HEIGHT, LEFT, BOTTOM] = [460, 190, 52, 22];

/** Choose about so many round values between two ends. */
function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(Number(value.toPrecision(6)));
  return found;
}

/** Thin a curve to about 400 points: the mean of each stretch. */
function thinned(points) {
  const size = Math.ceil(points.length / 400);
  if (size < 2) return points;
  const found = [];
  for (let i = 0; i < points.length; i += size) {
    const part = points.slice(i, i + size);
    found.push([part[part.length - 1][0], part.reduce((sum, [, value]) => sum + value, 0) / part.length]);
  }
  return found;
}

/** Draw a curve with axes; the pointer reads its values. */
function curve({ name, points }) {
  const known = points.filter(([, value]) => Number.isFinite(value));
  const readout = el("span.readout");
  const caption = el("figcaption", {}, name, readout);
  if (!known.length) return el("figure.card", {}, caption, el("p.soft", {}, "no values"));
  const [steps, values] = [known.map(([step]) => step), known.map(([, value]) => value)];
  const [first, last] = [steps[0], steps[steps.length - 1]];
  const least = values.reduce((a, b) => Math.min(a, b));
  const most = values.reduce((a, b) => Math.max(a, b));
  const x = (step) => LEFT + ((step - first) / (last - first || 1)) * (WIDTH - LEFT - 8);
  const y = (value) => 8 + (1 - (value - least) / (most - least || 1)) * (HEIGHT - BOTTOM - 14);
  const drawn = thinned(known);
  const said = `${name}: ${number(values[0])} at step ${count(first)}, ${number(values.at(-1))} at step ${count(last)}`;
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curve", role: "img", "aria-label": said });
  for (const value of ticks(least, most, 6)) {
    picture.append(svg("line", { class: "rule", x1: LEFT, x2: WIDTH - 8, y1: y(value), y2: y(value) }), svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  }
  for (const step of ticks(first, last, 4)) picture.append(svg("text", { x: x(step), y: HEIGHT - 4, "text-anchor": x(step) > WIDTH - 30 ? "end" : "middle" }, count(step)));
  picture.append(svg("polyline", { class: "line", points: drawn.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }));
  const dot = svg("circle", { class: "point", r: 4, cx: -9, cy: -9 });
  picture.append(dot);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const [step, value] = drawn.reduce((best, one) => (Math.abs(x(one[0]) - at) < Math.abs(x(best[0]) - at) ? one : best));
    dot.setAttribute("cx", x(step));
    dot.setAttribute("cy", y(value));
    readout.textContent = `${number(value)} at ${count(step)}`;
  });
  picture.addEventListener("pointerleave", () => ((readout.textContent = ""), dot.setAttribute("cx", -9)));
  return el("figure.card", {}, caption, picture);
}

/** The sheet of a step, and a slider over all of them. */
function sheets(run, steps) {
  if (!steps.length) return "";
  const wanted = steps.findIndex(({ step }) => String(step) === state.step);
  const picture = el("img", { decoding: "async" });
  const said = el("output", { for: "step" });
  const slider = el("input", { type: "range", id: "step", min: 0, max: steps.length - 1, step: 1, value: wanted < 0 ? steps.length - 1 : wanted, "aria-label": "Step" });
  const show = () => {
    const { step } = steps[slider.value];
    picture.src = sheet(run, step);
    picture.alt = `What run ${run} draws at step ${step}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    said.textContent = `step ${count(step)}`;
  };
  picture.addEventListener("error", () => (said.textContent = `step ${count(steps[slider.value].step)}: its sheet cannot be shown`));
  slider.addEventListener("input", show);
  slider.addEventListener("change", () => note({ step: String(steps[slider.value].step) }));
  show();
  return el("section.card.sheets", { "aria-label": "Sheets" }, el("div.sheet-head", {}, el("h3", {}, "What it draws"), slider, said), picture);
}

export async function showRuns(root, { signal }) {
  const runs = await get("runs", {}, signal);
  const head = el("header.view-head", {}, el("h2", { tabindex: -1 }, "Training"), el("p.soft", {}, runs.length ? "Runs beside the corpus." : "There is no run beside this corpus."));
  if (!runs.length) return root.replaceChildren(head);
  const run = runs.find(({ name }) => name === state.run) ?? runs[0];
  const tabs = runs.map(({ name, steps }) => el("a", { href: link({ run: name, step: null }), "aria-current": name === run.name ? "page" : null }, name, el("span.soft.small", {}, steps === undefined ? "" : ` ${count(steps)}`)));
  const found = await get(`runs/${encodeURIComponent(run.name)}`, {}, signal);
  const line = ({ source, key, shard, row, reason }) => el("li", {}, key ? el("a", { href: place({ source, key, shard, row }) }, `${source}/${key}`) : `${shard} row ${row}`, el("span.tag.drop", {}, reason ?? "broken"));
  const broken = found.broken?.length ? el("section.block", {}, el("h3", {}, "Samples that were found broken"), el("ul.lines", {}, ...found.broken.map(line))) : "";
  root.replaceChildren(head, el("nav.tabs", { "aria-label": "Runs" }, ...tabs), el("div.curves", {}, ...found.curves.map(curve)), sheets(run.name, found.sheets ?? []), broken);
}
