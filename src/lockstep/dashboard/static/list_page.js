// List page: all runs of a folder; two of them can be compared.

import { get, linkTo } from "./api.js";
import { el, say } from "./dom.js";
import { figure, moment } from "./format.js";

const LOOK = 1000;

export async function listPage(main) {
  const chosen = new Set();
  const body = el("tbody", {});
  const compare = el("button", { type: "button", disabled: true, onclick: () => {
    const [a, b] = chosen;
    location.href = linkTo(`/compare?a=${encodeURIComponent(a)}&b=${encodeURIComponent(b)}`);
  } }, "Compare two");
  const heads = ["", "run", "status", "steps", "metric", "workers", "recoveries", "fingerprint", "started"];
  main.replaceChildren(el("div", { class: "title" }, el("h1", {}, "Runs"), compare),
    el("table", { class: "runs" }, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))), body));
  const rows = new Map();
  document.title = "Runs · Lockstep";

  const choose = (name, box) => {
    if (box.checked) chosen.add(name);
    else chosen.delete(name);
    if (chosen.size > 2) {
      const first = chosen.values().next().value;
      chosen.delete(first);
      rows.get(first).box.checked = false;
    }
    compare.disabled = chosen.size !== 2;
  };

  const rowOf = (name) => {
    const box = el("input", { type: "checkbox", "aria-label": `compare ${name}` });
    box.addEventListener("change", () => choose(name, box));
    const cells = Object.fromEntries(["status", "steps", "metric", "workers", "recoveries", "fingerprint", "started"].map((key) => [key, el("td", { "data-label": key })]));
    cells.pill = el("span", { class: "pill" });
    cells.status.append(cells.pill);
    cells.print = el("code", {});
    cells.fingerprint.append(cells.print);
    const node = el("tr", {}, el("td", { class: "choose" }, box), el("th", { scope: "row" }, el("a", { href: linkTo(`/run/${encodeURIComponent(name)}`) }, name)),
      cells.status, cells.steps, cells.metric, cells.workers, cells.recoveries, cells.fingerprint, cells.started);
    return { node, box, cells };
  };

  for (;;) {
    const { runs } = await get("/api/runs");
    for (const run of runs) {
      if (!rows.has(run.folder)) rows.set(run.folder, rowOf(run.folder));
      const { cells } = rows.get(run.folder);
      const [name, value] = run.metrics[0] ?? ["loss", run.loss];
      say(cells.pill, run.status);
      cells.pill.className = `pill ${run.status}`;
      say(cells.steps, `${figure(run.step)} / ${figure(run.steps)}`);
      say(cells.metric, value === null ? "–" : `${name.replaceAll("_", " ")} ${figure(value)}`);
      say(cells.workers, figure(run.workers));
      say(cells.recoveries, run.recoveries ? figure(run.recoveries) : "–");
      say(cells.print, run.fingerprint ? run.fingerprint.slice(0, 12) : "–");
      cells.print.title = run.fingerprint;
      say(cells.started, run.started ? moment(run.started) : "–");
    }
    const nodes = runs.map((run) => rows.get(run.folder).node);
    if (nodes.length !== body.children.length || nodes.some((node, i) => body.children[i] !== node)) body.replaceChildren(...nodes);
    if (!runs.length) body.replaceChildren(el("tr", {}, el("td", { class: "soft", colSpan: heads.length }, "No runs here yet: lockstep run mnist makes one.")));
    await new Promise((resolve) => { setTimeout(resolve, document.hidden ? 5 * LOOK : LOOK); });
  }
}
