/** Requests to the server. */

let token = "";

export const setToken = (value) => (token = value);

async function answer(promise) {
  let response;
  try {
    response = await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: has microdit explore been stopped?");
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw Object.assign(new Error(body.error || `The server answers ${response.status}.`), { status: response.status });
  return body;
}

function address(path, parameters) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

/** Ask for JSON; the signal takes the request back, and with it the query. */
export const get = (path, parameters = {}, signal = null) => answer(fetch(address(`/api/${path}`, parameters), { signal }));

/** Send JSON with the token that only our own page knows. */
export const post = (path, body) =>
  answer(
    fetch(`/api/${path}`, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Microdit-Token": token },
      body: JSON.stringify(body),
    }),
  );

/** What names a sample: its shard and row too, where they are known. */
export const named = ({ source, key, shard, row }) => ({ source, key, shard, row });

/** The address of a picture that is at least so many CSS pixels large on its longer side. */
export function picture(row, pixels) {
  const wanted = pixels * Math.min(window.devicePixelRatio || 1, 2);
  const size = pixels === Infinity ? "full" : ([160, 320, 640].find((side) => side >= wanted * 0.9) ?? 640);
  return address("/api/image", { ...named(row), size });
}

export const decoded = (row, column) => address("/api/decoded", { ...named(row), column });

export const sheet = (run, step) => address(`/api/runs/${encodeURIComponent(run)}/sheet`, { step });

/** Run at most three of the tasks at once, in their order. */
export function queue() {
  const waiting = [];
  let running = 0;
  const next = () => {
    while (running < 3 && waiting.length) {
      running += 1;
      waiting.shift()().finally(() => ((running -= 1), next()));
    }
  };
  return (task) => (waiting.push(task), next());
}
