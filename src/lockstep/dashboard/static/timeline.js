// Timeline: a lane for the run and one for each worker of every host, over the time of the run.
//
// A column of a worker's lane is an interval; its parts are what the worker spent it on. Across the
// lanes: when workers were dead, starting, or held up by a recovery.

import { MARKS } from "./charts.js";
import { colour, el, say } from "./dom.js";
import { clock, duration } from "./format.js";

export const PHASES = ["compute", "data", "wait", "reduce", "exchange", "update", "evaluate"];
const NAMES = { compute: "computing", data: "loading data", wait: "waiting", reduce: "reducing",
  exchange: "exchange with hosts", update: "updating", evaluate: "evaluating", dead: "dead",
  starting: "starting", recovering: "recovering", checkpoint: "checkpoint", paused: "paused" };
const LANE = 30, RUN = 26, AXIS = 22, GAP = 5, HOST = 18;
const SPANS = [["all", null], ["10 min", 600], ["1 min", 60], ["20 s", 20]];
const NEAR = 4; // pixels

export class Timeline {
  constructor() {
    this.lanes = []; this.times = []; this.states = []; this.bands = []; this.marks = []; this.live = [];
    this.span = null; // seconds shown; null: all
    this.end = null; // the right end; null: now
    this.last = 0; this.lastAt = performance.now(); this.running = false;
    this.canvas = el("canvas", { tabIndex: 0, role: "img", "aria-label": "Timeline of the workers",
      onpointermove: (e) => this.point(e), onpointerleave: () => { this.hover.hidden = true; },
      onpointerdown: (e) => this.grab(e), onpointerup: () => { this.drag = null; },
      onpointercancel: () => { this.drag = null; },
      onwheel: (e) => this.wheel(e), onkeydown: (e) => this.key(e) });
    this.hover = el("div", { class: "hover", hidden: true });
    this.buttons = SPANS.map(([name, span]) => el("button", { type: "button",
      onclick: () => { this.span = span; this.end = null; this.draw(); } }, name));
    const keys = [...PHASES, "dead", "starting", "recovering", "checkpoint"];
    this.note = el("p", { class: "note" });
    this.node = el("div", { class: "timeline" },
      el("div", { class: "tools" }, el("span", { class: "group", role: "group", "aria-label": "Span" }, ...this.buttons),
        el("span", { class: "note" }, "drag, arrow keys, + and − move it")),
      this.frame = el("div", { class: "frame" }, this.canvas), this.hover,
      el("div", { class: "key" }, ...keys.map((key) => el("span", {}, el("i", { class: `swatch ${key}` }), NAMES[key]))),
      this.note);
    new ResizeObserver(() => this.draw()).observe(this.node);
    window.addEventListener("themed", () => this.draw());
    setInterval(() => { if (this.running && !this.end && !document.hidden) this.draw(); }, 250);
  }

  // The time of the run just now.
  now() {
    const since = (performance.now() - this.lastAt) / 1000;
    return this.last + (this.running ? Math.min(since, 30) : 0);
  }

  update(now, running) {
    if (now > this.last) [this.last, this.lastAt] = [now, performance.now()];
    this.running = running;
    this.draw();
  }

  view() {
    const end = this.end ?? this.now();
    const span = this.span ?? Math.max(end, 1);
    return [this.span === null ? 0 : end - span, end];
  }

  // Lanes in the order in which they are drawn: by host, then by worker.
  rows() {
    const order = this.lanes.map(([host, worker], number) => ({ host, worker, number }))
      .sort((a, b) => a.host.localeCompare(b.host) || a.worker - b.worker);
    const several = new Set(order.map((lane) => lane.host)).size > 1;
    let y = RUN + GAP;
    let host = null;
    for (const lane of order) {
      if (several && lane.host !== host) {
        lane.title = y;
        y += HOST;
      }
      host = lane.host;
      lane.y = y;
      y += LANE + GAP;
    }
    return { order, height: y + AXIS };
  }

  draw() {
    const width = this.node.clientWidth;
    if (!width) return;
    const { order, height } = this.rows();
    const ratio = devicePixelRatio;
    Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
    this.canvas.style.height = `${height}px`;
    this.gutter = width < 500 ? 58 : 76;
    const g = this.canvas.getContext("2d");
    g.scale(ratio, ratio);
    g.font = "12px system-ui, sans-serif";
    const [from, to] = this.view();
    const room = width - this.gutter - 1;
    this.x = (time) => this.gutter + ((time - from) / (to - from)) * room;
    this.time = (x) => from + ((x - this.gutter) / room) * (to - from);
    const paint = Object.fromEntries([...Object.keys(NAMES), "lane", "soft", "rule", "text", "joined", "scaled"].map((name) => [name, colour(name)]));
    g.save();
    g.beginPath();
    g.rect(this.gutter, 0, room, height);
    g.clip();
    g.fillStyle = paint.lane;
    g.fillRect(this.gutter, 0, room, RUN);
    for (const lane of order) g.fillRect(this.gutter, lane.y, room, LANE);
    const place = new Map(order.map((lane) => [lane.number, lane.y]));
    for (const row of this.times) this.drawTimes(g, row, place, paint, from, to);
    for (const row of this.live) this.drawTimes(g, row, place, paint, from, to);
    this.drawStates(g, order, paint, from, to);
    this.drawBands(g, paint, from, to, height);
    g.restore();
    g.fillStyle = paint.text;
    g.textBaseline = "middle";
    g.fillText("run", 0, RUN / 2);
    for (const lane of order) {
      g.fillStyle = paint.text;
      g.fillText(width < 500 ? `w ${lane.worker}` : `worker ${lane.worker}`, 0, lane.y + LANE / 2);
      if (lane.title !== undefined) {
        g.fillStyle = paint.soft;
        g.fillText(lane.host, 0, lane.title + HOST / 2);
      }
    }
    this.drawAxis(g, paint, from, to, height);
    this.buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(this.end === null && SPANS[i][1] === this.span)));
  }

  drawTimes(g, [lane, begun, ended, spent], place, paint, from, to) {
    const y = place.get(lane);
    if (y === undefined || ended < from || begun > to) return;
    const left = this.x(begun), wide = Math.max(this.x(ended) - left + 0.5, 1);
    const whole = Math.max(ended - begun, spent.reduce((a, b) => a + b, 0)) || 1;
    let bottom = y + LANE;
    spent.forEach((seconds, phase) => {
      const high = (seconds / whole) * LANE;
      if (high <= 0) return;
      g.fillStyle = paint[PHASES[phase]];
      g.fillRect(left, bottom - high, wide, high);
      bottom -= high;
    });
  }

  // Spans of a lane in which it is dead or starting.
  spans(lane) {
    const own = this.states.filter(([number]) => number === lane);
    return own.map(([, at, state], i) => [at, own[i + 1]?.[1] ?? (state === "left" ? at : Infinity), state]);
  }

  drawStates(g, order, paint, from, to) {
    for (const lane of order) {
      // A death is drawn over the start of the one that takes its place, however short it was.
      const spans = this.spans(lane.number).sort((a, b) => (a[2] === "dead") - (b[2] === "dead"));
      for (const [begun, until, state] of spans) {
        if (!["dead", "starting"].includes(state) || begun > to || until < from) continue;
        const left = this.x(begun);
        const right = this.x(Math.min(until, to));
        this.hatch(g, left, lane.y, Math.max(right - left, 3), LANE, paint[state]);
      }
    }
  }

  hatch(g, x, y, wide, high, stroke) {
    g.save();
    g.beginPath();
    g.rect(x, y, wide, high);
    g.clip();
    g.fillStyle = `${stroke}55`;
    g.fillRect(x, y, wide, high);
    g.strokeStyle = stroke;
    g.lineWidth = 2;
    g.beginPath();
    for (let at = x - high - ((x - high) % 7); at < x + wide; at += 7) {
      g.moveTo(at, y + high);
      g.lineTo(at + high, y);
    }
    g.stroke();
    g.restore();
  }

  drawBands(g, paint, from, to, height) {
    for (const [begun, until, kind] of this.bands) {
      if (until < from || begun > to) continue;
      const left = this.x(begun), wide = Math.max(this.x(until) - left, 2);
      g.fillStyle = paint[kind] ?? paint.soft;
      g.fillRect(left, 3, wide, RUN - 6);
      if (kind === "recovering" || kind === "paused") {
        g.globalAlpha = 0.25;
        g.fillRect(left, RUN, wide, height - RUN - AXIS);
        g.globalAlpha = 1;
      }
    }
    g.textAlign = "center";
    g.textBaseline = "middle";
    let free = 0;
    for (const [at, , kind] of this.marks) {
      if (at < from || at > to || !MARKS[kind]) continue;
      g.fillStyle = colour(MARKS[kind][0]);
      const sign = Math.max(this.x(at), free); // those of one moment stand side by side
      free = sign + 11;
      g.fillText(MARKS[kind][1], sign, RUN / 2);
    }
    g.textAlign = "left";
  }

  drawAxis(g, paint, from, to, height) {
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400, 604800]
      .find((each) => (to - from) / each < Math.max(3, this.node.clientWidth / 110)) ?? 2592000;
    g.fillStyle = paint.soft;
    g.strokeStyle = paint.rule;
    g.textAlign = "center";
    for (let at = Math.ceil(from / step) * step; at <= to; at += step) {
      const x = this.x(at);
      if (x < this.gutter + 14 || x > this.node.clientWidth - 16) continue;
      g.fillText(step < 1 ? `${at.toFixed(1)}` : clock(at), x, height - AXIS / 2);
    }
    g.textAlign = "left";
  }

  // What was at a point.
  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    if (this.drag) return this.pull(x);
    const at = this.time(x);
    const reach = Math.abs(this.time(NEAR) - this.time(0));
    const rows = [];
    const lane = this.rows().order.find((each) => y >= each.y && y < each.y + LANE);
    if (x >= this.gutter && lane) {
      const time = [...this.live, ...this.times].find(([number, begun, ended]) => number === lane.number && begun <= at && at <= ended);
      rows.push(el("b", {}, `worker ${lane.worker} on ${lane.host}`));
      const state = this.spans(lane.number).find(([begun, until]) => begun <= at && at < until);
      if (state && state[2] !== "working") rows.push(el("span", {}, el("i", { class: `swatch ${state[2]}` }), NAMES[state[2]] ?? state[2]));
      if (time) {
        const whole = time[3].reduce((a, b) => a + b, 0) || 1;
        time[3].forEach((seconds, phase) => {
          if (seconds / whole < 0.005) return;
          rows.push(el("span", {}, el("i", { class: `swatch ${PHASES[phase]}` }), `${NAMES[PHASES[phase]]} ${(100 * seconds / whole).toFixed(0)} %`));
        });
      }
    }
    for (const [begun, until, kind, text] of this.bands) {
      if (begun - reach <= at && at <= until + reach && (y < RUN || kind !== "checkpoint")) {
        rows.push(el("span", {}, el("i", { class: `swatch ${kind}` }), `${text} (${duration(until - begun)})`));
      }
    }
    for (const [when, , kind, text] of this.marks) {
      if (Math.abs(when - at) < reach && MARKS[kind]) rows.push(el("span", {}, el("i", { class: `mark ${MARKS[kind][0]}` }, MARKS[kind][1]), text));
    }
    this.hover.hidden = !rows.length || x < this.gutter;
    if (this.hover.hidden) return undefined;
    this.hover.replaceChildren(...rows.slice(0, 12), el("span", { class: "soft" }, `at ${clock(at)}`));
    const beside = x + 14 + this.hover.offsetWidth < box.width ? x + 14 : x - 14 - this.hover.offsetWidth;
    this.hover.style.left = `${Math.max(0, beside)}px`;
    this.hover.style.top = `${y + 14 + this.frame.offsetTop - this.frame.scrollTop}px`;
    return undefined;
  }

  grab(event) {
    if (event.pointerType === "touch" || this.span === null) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.drag = { x: event.clientX - this.canvas.getBoundingClientRect().left, end: this.view()[1] };
    this.hover.hidden = true;
  }

  pull(x) {
    const [from, to] = this.view();
    this.move(this.drag.end - (x - this.drag.x) * ((to - from) / (this.node.clientWidth - this.gutter)));
  }

  move(end) {
    const now = this.now();
    this.end = end >= now ? null : Math.max(end, this.span ?? 0);
    this.draw();
  }

  zoom(factor, around = null) {
    const [from, to] = this.view();
    const centre = around ?? (this.end === null ? to : (from + to) / 2);
    const span = (to - from) * factor;
    if (span >= this.now()) [this.span, this.end] = [null, null];
    else {
      this.span = Math.max(span, 0.5);
      const end = centre + (to - centre) * factor;
      this.end = end >= this.now() ? null : Math.max(end, this.span);
    }
    this.draw();
  }

  wheel(event) {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    const x = event.clientX - this.canvas.getBoundingClientRect().left;
    this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this.time(x));
  }

  key(event) {
    const [from, to] = this.view();
    const actions = {
      ArrowLeft: () => this.move(to - (to - from) / 4), ArrowRight: () => this.move(to + (to - from) / 4),
      "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2),
      Home: () => { [this.span, this.end] = [null, null]; this.draw(); }, End: () => this.move(Infinity),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  describe(text) {
    say(this.note, text);
    this.canvas.setAttribute("aria-label", `Timeline of the workers. ${text}`);
  }
}
