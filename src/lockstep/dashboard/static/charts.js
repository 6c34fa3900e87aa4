// Charts: curves over steps, drawn by uPlot, with what happened to the run marked on them.

import { colour, el } from "./dom.js";
import { figure } from "./format.js";

const HEIGHT = { large: 260, small: 180 };
export const MARKS = {
  died: ["dead", "✕"], joined: ["joined", "+"], scaled: ["scaled", "⇅"], resumed: ["scaled", "↻"],
  corrupt: ["dead", "!"], ended: ["soft", "■"],
};
const NEAR = 7; // pixels

// Rows with their step in second place, without those that a resume has made void.
export function latest(rows) {
  const kept = [];
  let least = Infinity;
  for (let i = rows.length - 1; i >= 0; i--) {
    if (rows[i][1] < least) {
      kept.push(rows[i]);
      least = rows[i][1];
    }
  }
  return kept.reverse();
}

// Exponential moving average, without the pull of its first value.
export function smooth(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

export class Chart {
  // `lines`: [{label, colour, band?}], of which the first may have a band. `marks`: rows of marks.
  constructor(title, { size = "small", lines, unit = "" }) {
    this.lines = lines;
    this.unit = unit;
    this.size = size;
    this.xs = [];
    this.series = [];
    this.marks = [];
    this.weight = 0;
    this.log = false;
    this.level = null;
    this.value = el("span", { class: "soft" });
    this.hover = el("div", { class: "hover", hidden: true });
    this.plot = el("div", { class: "plot", tabIndex: 0, role: "img", "aria-label": title,
      onkeydown: (event) => this.key(event), onblur: () => this.hide() });
    this.heading = el("h3", {}, title, " ", this.value);
    this.node = el("figure", {}, this.heading, this.plot, this.hover);
    new ResizeObserver(() => this.resize()).observe(this.plot);
    window.addEventListener("themed", () => this.rebuild());
  }

  set(xs, series, marks = this.marks) {
    Object.assign(this, { xs, series, marks });
    const last = series[0]?.findLast?.((value) => value !== null);
    this.value.textContent = last === undefined || this.lines.length > 1 ? "" : `${figure(last)}${this.unit}`;
    this.plot.setAttribute("aria-label",
      `${this.heading.firstChild.textContent}: ${this.value.textContent}, at step ${figure(xs.at(-1))}`);
    if (this.chart) this.chart.setData(this.data());
    else this.rebuild();
  }

  options(weight, log) {
    if (weight === this.weight && log === this.log) return;
    Object.assign(this, { weight, log });
    this.rebuild();
  }

  // A level to compare the curve with: {value, label, colour}, or null.
  compare(level) {
    if (JSON.stringify(level) === JSON.stringify(this.level)) return;
    this.level = level;
    this.rebuild();
  }

  data() {
    const positive = (values) => (this.log ? values.map((v) => (v !== null && v > 0 ? v : null)) : values);
    const columns = [this.xs];
    this.lines.forEach((line, i) => {
      const raw = positive(this.series[i] ?? []);
      columns.push(this.weight ? smooth(raw, this.weight) : raw);
    });
    if (this.weight) columns.push(positive(this.series[0] ?? []));
    for (const band of this.bands()) columns.push(positive(band));
    return columns;
  }

  bands() {
    return this.series.slice(this.lines.length, this.lines.length + 2);
  }

  width() {
    return Math.max(200, Math.floor(this.plot.clientWidth));
  }

  rebuild() {
    if (!this.xs.length || !this.plot.isConnected) return;
    this.chart?.destroy();
    const banded = this.bands().length === 2;
    const thin = { show: true, points: { show: false }, width: 1 };
    const few = this.xs.length < 40;
    const series = [{}, ...this.lines.map((line) => ({
      label: line.label, stroke: () => colour(line.colour), width: 1.8, spanGaps: true,
      points: { show: few, size: 5, fill: () => colour(line.colour) } }))];
    if (this.weight) series.push({ ...thin, stroke: () => `${colour(this.lines[0].colour)}55`, spanGaps: true });
    const first = series.length;
    if (banded) series.push({ ...thin, stroke: "transparent" }, { ...thin, stroke: "transparent" });
    const axis = { stroke: () => colour("soft"), font: "12px system-ui", ticks: { show: false },
      grid: { stroke: () => colour("rule"), width: 1 } };
    this.chart = new uPlot({
      width: this.width(), height: HEIGHT[this.size], legend: { show: false },
      cursor: { y: false, points: { size: 7 }, drag: { x: true, y: false },
        bind: { dblclick: (u) => () => { u.setData(this.data()); } } },
      scales: { x: { time: false, range: (u, low, high) => [low, high > low ? high : low + 1] },
        y: this.level ? { range: (u, low, high) => uPlot.rangeNum(
          Math.min(low ?? this.level.value, this.level.value), Math.max(high ?? this.level.value, this.level.value), 0.1, true) }
          : { distr: this.log ? 3 : 1 } },
      axes: [{ ...axis, grid: { show: false }, size: 26, values: (u, ticks) => ticks.map(figure) },
        { ...axis, size: 56, values: (u, ticks) => ticks.map((t) => (t === null ? "" : figure(t))) }],
      series,
      bands: banded ? [{ series: [first + 1, first], fill: () => `${colour(this.lines[0].colour)}26` }] : [],
      hooks: { draw: [(u) => this.drawLevel(u), (u) => this.drawMarks(u)], setCursor: [(u) => this.follow(u)] },
    }, this.data(), this.plot);
    this.chart.over.addEventListener("pointerleave", () => this.hide());
  }

  resize() {
    if (!this.chart) this.rebuild();
    else if (this.chart.width !== this.width()) this.chart.setSize({ width: this.width(), height: HEIGHT[this.size] });
  }

  drawLevel(u) {
    if (!this.level) return;
    const { ctx } = u;
    const y = u.valToPos(this.level.value, "y", true);
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour(this.level.colour);
    ctx.lineWidth = 1.4 * devicePixelRatio;
    ctx.setLineDash([6 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(u.bbox.left, y);
    ctx.lineTo(u.bbox.left + u.bbox.width, y);
    ctx.stroke();
    ctx.restore();
  }

  drawMarks(u) {
    const { ctx } = u;
    const ratio = devicePixelRatio;
    ctx.save();
    ctx.font = `${11 * ratio}px system-ui`;
    ctx.textAlign = "center";
    let free = 0; // where the next sign has room: those of one step stand side by side
    for (const [, step, kind] of [...this.marks].sort((a, b) => a[1] - b[1])) {
      const known = MARKS[kind];
      const x = u.valToPos(step, "x", true);
      if (!known || x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      ctx.strokeStyle = ctx.fillStyle = colour(known[0]);
      ctx.lineWidth = ratio;
      ctx.setLineDash([3 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(x, u.bbox.top + 12 * ratio);
      ctx.lineTo(x, u.bbox.top + u.bbox.height);
      ctx.stroke();
      const sign = Math.max(x, free);
      free = sign + 11 * ratio;
      ctx.fillText(known[1], sign, u.bbox.top + 9 * ratio);
    }
    ctx.restore();
  }

  // The values under the cursor, and what happened there.
  follow(u) {
    const { idx, left } = u.cursor;
    if (idx === null || idx === undefined || left < 0) return this.hide();
    const rows = [el("b", {}, `step ${figure(this.xs[idx])}`)];
    this.lines.forEach((line, i) => {
      const value = this.series[i]?.[idx];
      if (value === null || value === undefined) return;
      rows.push(el("span", {}, el("i", { class: `swatch ${line.colour}` }), `${line.label} ${figure(value)}${this.unit}`));
      if (this.weight) rows.push(el("span", { class: "soft" }, `smoothed ${figure(u.data[i + 1][idx])}`));
    });
    const [low, high] = this.bands();
    if (low && low[idx] !== null) rows.push(el("span", { class: "soft" }, `from ${figure(low[idx])} to ${figure(high[idx])}`));
    if (this.level) rows.push(el("span", { class: "soft" }, `${figure(this.level.value)}${this.unit} ${this.level.label}`));
    const near = this.marks.filter(([, step, kind]) => MARKS[kind] && Math.abs(u.valToPos(step, "x") - left) < NEAR);
    for (const [, , kind, text] of near.slice(0, 4)) {
      rows.push(el("span", {}, el("i", { class: `mark ${MARKS[kind][0]}` }, MARKS[kind][1]), text));
    }
    this.hover.replaceChildren(...rows);
    this.hover.hidden = false;
    const room = this.plot.clientWidth, at = left + u.over.offsetLeft;
    const beside = at + 12 + this.hover.offsetWidth < room ? at + 12 : at - 12 - this.hover.offsetWidth;
    this.hover.style.left = `${Math.max(0, beside)}px`;
    return undefined;
  }

  hide() {
    this.hover.hidden = true;
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (!move || !this.chart) return;
    event.preventDefault();
    const at = this.chart.cursor.idx ?? this.xs.length - 1;
    const next = Math.min(this.xs.length - 1, Math.max(0, at + move));
    this.chart.setCursor({ left: this.chart.valToPos(this.xs[next], "x"), top: 10 });
  }
}
