// API: questions to the server, each with the token that was in the page's address after "#".

const KEY = "lockstep-token";
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem(KEY, given);
  history.replaceState(null, "", location.pathname + location.search);
}
const token = sessionStorage.getItem(KEY) ?? "";

// A link to a page of ours: opened in a tab of its own, it has to bring the token.
export function linkTo(path) {
  return `${path}#token=${encodeURIComponent(token)}`;
}

async function fetched(path, options = {}) {
  const headers = { Authorization: `Bearer ${token}`, ...options.headers };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (!response.ok) {
    let told = {};
    try { told = await response.json(); } catch { /* no answer of ours */ }
    const error = new Error(told.what ?? `the server answers ${response.status}`);
    Object.assign(error, { status: response.status, fix: told.fix ?? "", expected: told.expected ?? "" });
    throw error;
  }
  return response;
}

export async function get(path) {
  return (await fetched(path)).json();
}

export async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return (await fetched(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

// Each line of a stream is given to `take`. Returns when the stream has ended.
export async function stream(path, take) {
  const reader = (await fetched(path)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) take(JSON.parse(line));
  }
}

export const runPath = (name) => `/api/runs/${encodeURIComponent(name)}`;
