/** The state of the page is the fragment of its URL. */

const listeners = [];
const VIEWS = ["grid", "sample", "failures", "groups", "compare", "runs"];
const OF_A_VIEW = ["source", "key", "shard", "row", "column", "reason", "kind", "a", "b", "run", "step"];
const OF_THE_LIST = ["like", "text", "order", "seed", "at"];

export let state = read();

function read() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (!VIEWS.includes(given.view)) given.view = "grid";
  return { where: "", ...given };
}

/** The fragment for the state with these changes; null takes a part away. A new filter begins its list anew. */
export function link(changes) {
  const next = { ...state };
  if (changes.view && changes.view !== state.view) for (const name of OF_A_VIEW) delete next[name];
  if (["where", "like", "text"].some((name) => name in changes)) for (const name of OF_THE_LIST) delete next[name];
  if ("order" in changes) delete next.at;
  Object.assign(next, changes);
  if (next.view === "grid") delete next.view;
  const given = Object.entries(next).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return `#${new URLSearchParams(given)}`;
}

/** Go to a state: a new entry of the history, or in place of the one that is there. */
export function go(changes, replace = false) {
  const target = link(changes);
  if (target === (location.hash || "#")) return;
  history[replace ? "replaceState" : "pushState"](null, "", target === "#" ? location.pathname : target);
  changed();
}

/** Note something in the URL that changes nothing of what is shown. */
export function note(changes) {
  history.replaceState(null, "", link(changes));
  state = read();
}

export const onChange = (listener) => listeners.push(listener);

function changed() {
  const before = state;
  state = read();
  for (const listener of listeners) listener(before);
}

addEventListener("popstate", changed);
