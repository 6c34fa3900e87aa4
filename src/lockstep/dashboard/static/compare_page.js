// Compare page: two runs side by side: settings, curves, and where their ledgers part.

import { get, linkTo } from "./api.js";
import { Chart, latest } from "./charts.js";
import { el, section } from "./dom.js";
import { figure } from "./format.js";

export async function comparePage(main, asked) {
  const [a, b] = [asked.get("a") ?? "", asked.get("b") ?? ""];
  const { runs, settings, parting } = await get(`/api/compare?a=${encodeURIComponent(a)}&b=${encodeURIComponent(b)}`);
  document.title = `${a} and ${b} · Lockstep`;
  const colours = ["line", "data"];
  const names = [a, b];
  const key = el("p", { class: "key" }, ...names.map((name, i) => el("span", {}, el("i", { class: `swatch ${colours[i]}` }),
    el("a", { href: linkTo(`/run/${encodeURIComponent(name)}`) }, name))));
  const equal = parting.step === null
    ? el("p", { class: "good" }, `The ledgers are equal in all ${figure(parting.equal)} steps that both have.`)
    : el("p", { class: "bad" }, parting.step === 0 ? "The ledgers differ from the first step on: " : `The ledgers are equal in the first ${figure(parting.equal)} steps, and differ at step ${figure(parting.step)}: `, parting.what);
  const rows = [
    ["status", ...runs.map(({ facts }) => facts.status)],
    ...metricRows(runs),
    ["steps", ...runs.map(({ facts }) => `${figure(facts.step)} / ${figure(facts.steps)}`)],
    ["samples/s", ...runs.map(({ facts }) => figure(facts.rate))],
    ["recoveries", ...runs.map(({ facts }) => figure(facts.recoveries))],
    ["fingerprint", ...runs.map(({ facts }) => (facts.fingerprint ? `${facts.fingerprint.slice(0, 24)}…` : "–"))],
  ];
  const marked = parting.step === null ? [] : [[null, parting.step, "corrupt", "the ledgers part here"]];
  const charts = curves(runs, names, colours).map(([title, series, size]) => {
    const chart = new Chart(title, { size, lines: names.map((label, i) => ({ label, colour: colours[i] })) });
    return [chart, ...joined(series), marked];
  });
  const smoothing = el("input", { type: "range", min: "0", max: "0.98", step: "0.02", value: "0" });
  const log = el("input", { type: "checkbox" });
  const options = () => charts.forEach(([chart]) => chart.options(Number(smoothing.value), log.checked));
  smoothing.addEventListener("input", options);
  log.addEventListener("change", options);
  main.replaceChildren(el("h1", {}, "Two runs"), key, equal,
    el("div", { class: "tools" }, el("label", {}, "smoothing ", smoothing), el("label", {}, log, " log scale")),
    charts[0] ? charts[0][0].node : null, el("div", { class: "grid" }, ...charts.slice(1).map(([chart]) => chart.node)),
    section("Results", table(names, rows)),
    section("Settings that differ", settings.length ? table(names, settings) : el("p", { class: "soft" }, "None.")));
  for (const [chart, xs, series, marks] of charts) chart.set(xs, series, marks);
}

function metricRows(runs) {
  const names = new Set(runs.flatMap(({ facts }) => facts.metrics.map(([name]) => name)));
  return [...names].map((name) => [name.replaceAll("_", " "), ...runs.map(({ facts }) => figure(facts.metrics.find(([each]) => each === name)?.[1]))]);
}

// `[title, [points of a, points of b], size]` of the loss and of each metric.
function curves(runs) {
  const found = [["Training loss", runs.map((run) => latest(run.progress).map((row) => [row[1], row[2]])), "large"]];
  const evaluations = runs.map((run) => latest(run.evaluations));
  for (const name of new Set(evaluations.flat().flatMap((row) => Object.keys(row[2])))) {
    found.push([`Held-out ${name}`, evaluations.map((rows) => rows.map((row) => [row[1], row[2][name] ?? null])), "small"]);
  }
  return found.filter(([, series]) => series.some((points) => points.length));
}

// Two series over the steps of both.
function joined(series) {
  const [xs, ...values] = uPlot.join(series.map((points) => [points.map(([x]) => x), points.map(([, y]) => y)]));
  return [xs, values.map((column) => column.map((value) => value ?? null))];
}

function table(names, rows) {
  return el("table", { class: "side" }, el("thead", {}, el("tr", {}, el("th", {}), ...names.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, ...rows.map(([name, ...values]) => el("tr", {}, el("th", { scope: "row" }, name), ...values.map((value) => el("td", {}, value))))));
}
