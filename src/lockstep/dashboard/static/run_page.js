// Run page: one run, while it goes on and afterwards.

import { runPath, stream } from "./api.js";
import { Chart, latest } from "./charts.js";
import { Controls } from "./controls.js";
import { el, folded, pairs, say, section } from "./dom.js";
import { clock, count, figure, moment, rate } from "./format.js";
import { Timeline } from "./timeline.js";

const LIVE = ["running", "paused"];
const MOST_LIVE = 1200;
const LOUD = new Set(["died", "recovered", "stalled", "host_lost", "hosts", "corrupt", "request", "failed",
  "ended", "finished", "resumed", "checkpoint_failed", "fork_failed", "not_saved", "lost_loader", "note", "verified"]);
const SHOWN_EVENTS = 200;

export async function runPage(main, name) {
  const page = new RunPage(main, name);
  const link = document.getElementById("link");
  for (;;) {
    let ended = false;
    try {
      say(link, "");
      await stream(`${runPath(name)}/stream`, (message) => {
        ended ||= message.closing;
        if (message.error) throw Object.assign(new Error(message.error.what), { final: true });
        page.take(message);
      });
    } catch (error) {
      if (error.status || error.final) throw error;
    }
    if (ended && !LIVE.includes(page.facts.status)) {
      say(link, "the server has ended; lockstep watch shows this again");
      return;
    }
    say(link, "not connected; trying again");
    await new Promise((resolve) => { setTimeout(resolve, 1000); });
  }
}

class RunPage {
  constructor(main, name) {
    Object.assign(this, { main, name, facts: {} });
    this.rows = { progress: [], evaluations: [], marks: [], lanes: [], times: [], states: [], bands: [], events: [], memory: [] };
    this.liveProgress = [];
    this.metrics = new Map();
    this.head = el("header", {});
    this.title = el("h1", {}, name);
    this.status = el("span", { class: "pill" });
    this.about = el("p", { class: "soft about" });
    this.bar = el("progress", { max: 1, value: 0, "aria-label": "Steps" });
    this.barText = el("p", { class: "soft bar-text" });
    this.tiles = el("dl", { class: "tiles" });
    this.controls = new Controls(name);
    this.loss = new Chart("Training loss", { size: "large", lines: [{ label: "loss", colour: "line" }] });
    this.speed = new Chart("Throughput", { lines: [{ label: "throughput", colour: "compute" }], unit: " samples/s" });
    this.norm = new Chart("Gradient norm", { lines: [{ label: "norm", colour: "update" }] });
    this.rate = new Chart("Learning rate", { lines: [{ label: "learning rate", colour: "wait" }] });
    this.memory = new Chart("Memory of a worker", { lines: [{ label: "mean", colour: "data" }], unit: " MB" });
    this.charts = el("div", { class: "grid" });
    this.timeline = new Timeline();
    this.ledger = el("div", {});
    this.details = el("div", {});
    this.recoveries = el("div", {});
    this.events = el("ol", { class: "events" });
    this.all = el("input", { type: "checkbox", onchange: () => this.showEvents() });
    this.smoothing = el("input", { type: "range", min: "0", max: "0.98", step: "0.02", value: "0",
      oninput: () => this.options() });
    this.log = el("input", { type: "checkbox", onchange: () => this.options() });
    main.replaceChildren(
      el("header", {}, el("div", { class: "title" }, this.title, this.status), this.about, this.bar, this.barText,
        this.tiles, this.controls.node),
      el("section", {}, el("div", { class: "tools" },
        el("label", {}, "smoothing ", this.smoothing), el("label", {}, this.log, " log scale")), this.loss.node),
      section("Timeline", this.timeline.node, this.recoveries),
      section("Metrics", this.charts),
      section("Ledger", this.ledger),
      this.details,
      section("Events", el("label", { class: "tools" }, this.all, " all of them"), this.events),
    );
  }

  take(message) {
    if (!message.facts) return;
    if (message.anew) {
      for (const name of Object.keys(this.rows)) this.rows[name] = [];
      this.liveProgress = [];
      this.timeline.live = [];
      this.showDetails(message.details);
    }
    for (const [name, rows] of Object.entries(message.rows ?? {})) for (const row of rows) this.rows[name].push(row);
    if (message.rows?.marks?.some((row) => row[2] === "resumed")) this.liveProgress = [];
    if (message.live) {
      this.liveProgress = [...this.liveProgress, ...message.live.progress].slice(-MOST_LIVE);
      this.timeline.live = [...this.timeline.live, ...message.live.times].slice(-MOST_LIVE * 4);
    }
    this.facts = message.facts;
    this.showHead();
    this.showCurves();
    this.showTimeline(message);
    this.showLedger();
    if (message.rows?.events || message.anew) this.showEvents();
    this.controls.update(this.facts);
  }

  showHead() {
    const { facts } = this;
    const live = LIVE.includes(facts.status);
    document.title = `${facts.status === "running" ? "▶ " : ""}${facts.folder} · Lockstep`;
    say(this.title, facts.folder);
    say(this.status, facts.status);
    this.status.className = `pill ${facts.status}`;
    const about = [
      facts.started && moment(facts.started), facts.parameters !== null && count(facts.parameters, "parameter"),
      facts.command,
    ].filter(Boolean);
    const shown = about.join("\u2003");
    if (this.about.dataset.shown !== shown) {
      this.about.dataset.shown = shown;
      this.about.replaceChildren(...about.map((text, i) => el(i === about.length - 1 && facts.command ? "code" : "span", {}, text)));
    }
    this.bar.max = Math.max(facts.steps ?? facts.step, 1);
    this.bar.value = facts.step;
    const seconds = this.timeline.last;
    const left = live && facts.step ? (seconds / facts.step) * (facts.steps - facts.step) : 0;
    say(this.barText, `step ${figure(facts.step)} of ${figure(facts.steps)}, ${clock(facts.seconds)} so far`
      + (left ? `, about ${clock(left)} left` : "") + (facts.why ? `. ${facts.why}` : ""));
    const tiles = [
      ...facts.metrics.map(([name, value, baseline]) => [name.replaceAll("_", " "), figure(value), name === "train_loss" ? "last step" : baseline === null ? "held-out" : `baseline ${figure(baseline)}`]),
      ["samples/s", rate(facts.rate), facts.predicted ? `predicted ${rate(facts.predicted.rate)} for ${count(facts.predicted.workers, "worker")}` : ""],
      ["workers", live ? `${facts.workers}${facts.target !== facts.workers ? ` of ${facts.target}` : ""}` : figure(facts.workers),
        facts.hosts.length > 1 ? count(facts.hosts.length, "host") : facts.shards ? `${facts.shards} shards` : ""],
      ["recoveries", figure(facts.recoveries), ""],
    ];
    if (!facts.metrics.some(([name]) => name === "train_loss")) tiles.splice(facts.metrics.length, 0, ["train loss", figure(facts.loss), "lately"]);
    const key = JSON.stringify(tiles);
    if (this.tiles.dataset.key !== key) {
      this.tiles.dataset.key = key;
      this.tiles.replaceChildren(...tiles.map(([name, value, note]) => el("div", {}, el("dt", {}, name), el("dd", {}, value), note ? el("dd", { class: "note" }, note) : null)));
    }
    if (facts.fingerprint && !this.fingerprint) {
      this.fingerprint = el("p", { class: "print" }, el("span", { class: "soft" }, "fingerprint "), el("code", {}, facts.fingerprint),
        facts.holds_for ? el("span", { class: "note" }, ` holds for ${facts.holds_for}`) : null);
      this.tiles.after(this.fingerprint);
    }
  }

  // What is kept, and what is newer than it or in between.
  progress() {
    const kept = latest(this.rows.progress);
    const steps = new Set(kept.map((row) => row[1]));
    const live = this.liveProgress.filter((row) => !steps.has(row[1]));
    return [...kept, ...live].sort((a, b) => a[1] - b[1]);
  }

  showCurves() {
    const rows = this.progress();
    if (!rows.length) return;
    const { marks } = this.rows;
    const column = (index) => rows.map((row) => row[index]);
    const steps = column(1);
    this.loss.set(steps, [column(2), column(3), column(4)], marks);
    const evaluations = latest(this.rows.evaluations);
    for (const name of new Set(evaluations.flatMap(([, , metrics]) => Object.keys(metrics)))) {
      if (!this.metrics.has(name)) {
        const chart = new Chart(`Held-out ${name}`, { lines: [{ label: name, colour: "reduce" }] });
        this.metrics.set(name, chart);
        this.charts.prepend(chart.node);
        chart.options(Number(this.smoothing.value), this.log.checked);
      }
      this.metrics.get(name).set(evaluations.map((row) => row[1]), [evaluations.map((row) => row[2][name] ?? null)], marks);
    }
    const { predicted } = this.facts;
    this.speed.compare(predicted && { value: predicted.rate, label: `predicted by ${predicted.how}`, colour: "soft" });
    for (const [chart, index] of [[this.speed, 5], [this.norm, 6], [this.rate, 8]]) {
      const values = column(index);
      if (values.every((value) => value === null)) continue;
      if (!chart.node.isConnected) this.charts.append(chart.node);
      chart.set(steps, [values], marks);
    }
    const memory = latest(this.rows.memory);
    if (memory.length > 1) {
      if (!this.memory.node.isConnected) this.charts.append(this.memory.node);
      const megabytes = (index) => memory.map((row) => row[index] / 1e6);
      this.memory.set(memory.map((row) => row[1]), [megabytes(2), megabytes(3), megabytes(4)], marks);
    }
  }

  options() {
    const weight = Number(this.smoothing.value);
    const linear = [this.speed, this.memory];
    for (const chart of [this.loss, this.norm, this.rate, ...linear, ...this.metrics.values()]) {
      chart.options(weight, this.log.checked && !linear.includes(chart));
    }
  }

  showTimeline(message) {
    const { timeline, rows, facts } = this;
    Object.assign(timeline, { lanes: rows.lanes, times: rows.times, states: rows.states, bands: rows.bands, marks: rows.marks });
    const ends = [...rows.times.slice(-1).map((row) => row[2]), ...rows.events.slice(-1).map((row) => row[0]), ...timeline.live.slice(-1).map((row) => row[2])];
    timeline.update(Math.max(0, ...ends), facts.status === "running");
    timeline.describe(`${count(rows.lanes.length, "worker")} on ${count(Math.max(facts.hosts.length, 1), "host")}, ${count(facts.recoveries, "recovery").replace("recoverys", "recoveries")}.`);
    if (message.rows?.bands || message.anew) {
      const found = rows.bands.filter(([, , kind]) => kind === "recovering").slice(-20).reverse();
      this.recoveries.replaceChildren(...(found.length ? [el("h3", {}, "Recoveries"), el("ul", { class: "recoveries" },
        ...found.map(([at, , , text]) => el("li", {}, el("span", { class: "soft" }, `${clock(at)} `), text)))] : []));
    }
  }

  showLedger() {
    const { ledger, verified, final_verified: final, step } = this.facts;
    const key = JSON.stringify([ledger, verified, final]);
    if (this.ledger.dataset.key === key) return;
    this.ledger.dataset.key = key;
    const chain = ledger.broken !== null
      ? el("p", { class: "bad" }, `Line ${figure(ledger.broken)} of the ledger is not what was recorded.`)
      : el("p", {}, `The chain of hashes holds for ${count(ledger.steps, "step")}${ledger.whole ? ", to its end" : ""}.`);
    const replayed = verified.length
      ? el("p", {}, `Replayed and equal: steps ${verified.map(([a, b]) => `${figure(a)} to ${figure(b)}`).join(", ")}${final ? ", and the final state" : ""}.`)
      : el("p", { class: "soft" }, "Not replayed yet: ", el("code", {}, `lockstep verify ${this.facts.folder}`), " does that.");
    const bar = el("div", { class: "spans", role: "img", "aria-label": "The part of the ledger that is checked and replayed" });
    const whole = Math.max(step, ledger.steps, 1);
    const part = (className, from, to) => {
      const node = el("i", { class: className });
      node.style.left = `${(100 * from) / whole}%`;
      node.style.width = `${(100 * (to - from)) / whole}%`;
      bar.append(node);
    };
    part(ledger.broken === null ? "checked" : "checked bad", 0, ledger.steps);
    for (const [from, to] of verified) part("replayed", from, to);
    this.ledger.replaceChildren(bar, chain, replayed);
  }

  showDetails({ changed, same, plan, reasons, machine }) {
    this.details.replaceChildren(
      section("Plan", el("ul", {}, ...reasons.map((reason) => el("li", {}, reason))), folded("the whole plan", pairs(plan)), folded("the machine", pairs(machine))),
      section("Settings", changed.length ? pairs(changed) : el("p", { class: "soft" }, "All as they are by default."), folded(count(same.length, "setting") + " as by default", pairs(same))));
  }

  showEvents() {
    const shown = this.rows.events.filter(([, , name]) => this.all.checked || LOUD.has(name)).slice(-SHOWN_EVENTS).reverse();
    this.events.replaceChildren(...shown.map(([at, utc, name, text]) => el("li", { class: `event ${name}` },
      el("time", { datetime: utc, title: moment(utc) }, at === null ? "" : clock(at)), el("b", {}, name.replaceAll("_", " ")), el("span", {}, text))));
    if (!shown.length) this.events.append(el("li", { class: "soft" }, "Nothing out of the ordinary."));
  }
}


