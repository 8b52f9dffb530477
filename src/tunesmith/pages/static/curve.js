// The curve of a run: uPlot over the series that the server has thinned, with keys, zoom and words for who hears it.
"use strict";
import {failure} from "./page.js";

const POINTS = 1200;
/** Distances between the marks of the axis of steps: whole ones. */
const WHOLE = [0, 1, 2, 3, 4, 5, 6].flatMap(power => [1, 2, 5].map(number => number * 10 ** power));

/** @param {HTMLElement} figure */
function island(figure) {
  let plot = null, values = null, window_ = null, at = null, asked = 0, isDrawing = false;
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const said = document.getElementById("curve-said");

  /** One column of steps; training and held-out losses join by number. */
  function columns() {
    const {training, held_out} = values;
    const byStep = new Map(training.step.map((step, i) => [step, i]));
    const held = new Map(held_out.filter(([step]) => !window_ || (step >= window_[0] && step <= window_[1])));
    const steps = [...new Set([...training.step, ...held.keys()])].sort((a, b) => a - b);
    const column = name => steps.map(step => byStep.has(step) ? training[name][byStep.get(step)] : null);
    return [steps, column("low"), column("high"), column("mean"), steps.map(step => held.get(step) ?? null)];
  }

  function bounds() {
    const [, , , mean, held] = columns();
    const losses = [...mean, ...held].filter(loss => loss !== null).sort((a, b) => a - b);
    if (!losses.length) return [0, 1];
    const most = losses[Math.min(losses.length - 1, Math.floor(0.995 * losses.length))];
    const low = losses[0], high = Math.max(most, ...held.filter(loss => loss !== null));
    const room = 0.06 * (high - low) || 0.5;
    return [low - room, high + room];
  }

  function draw() {
    const data = columns();
    const width = Math.max(240, figure.clientWidth), height = Math.max(200, Math.min(340, Math.round(width / 3)));
    if (plot) {
      isDrawing = true; // the cursor stays where it is: nobody moved it
      if (plot.width !== width || plot.height !== height) plot.setSize({width, height});
      plot.setData(data);
      setTimeout(() => { // it is drawn in a microtask
        if (at !== null) plot.setCursor({left: plot.valToPos(at, "x"), top: 10});
        isDrawing = false;
      }, 0);
      return;
    }
    const ink = () => colour("--ink"), muted = () => colour("--muted"), rule = () => colour("--rule"), accent = () => colour("--accent");
    const linear = uPlot.paths.linear(); // two points are the before and after of a table, not a course
    const course = (...given) => values.held_out.length > 2 ? linear(...given) : null;
    const axis = {stroke: muted, grid: {stroke: rule, width: 1}, ticks: {show: false}, font: "11px system-ui, sans-serif"};
    plot = new uPlot({
      width, height, legend: {show: false}, padding: [10, 12, 0, 0],
      cursor: {drag: {x: true, y: false}, points: {size: 7}},
      scales: {x: {time: false, range: (_, low, high) => window_ ?? [0, Math.max(values.steps, high || 1)]}, y: {range: bounds}},
      axes: [{...axis, grid: {show: false}, incrs: WHOLE}, {...axis, size: 52}],
      bands: [{series: [2, 1], fill: () => colour("--band")}],
      series: [
        {},
        {stroke: "transparent", points: {show: false}}, {stroke: "transparent", points: {show: false}},
        {stroke: ink, width: 1.6, points: {show: false}, spanGaps: true},
        {stroke: accent, width: 1.6, dash: [5, 3], spanGaps: true, paths: course, points: {show: true, size: 8, width: 2, stroke: accent, fill: () => colour("--paper")}},
      ],
      hooks: {
        setSelect: [chart => {
          const {left, width: wide} = chart.select;
          if (wide > 4) zoom(Math.round(chart.posToVal(left, "x")), Math.round(chart.posToVal(left + wide, "x")));
        }],
        setCursor: [chart => { if (chart.cursor.idx != null && !isDrawing) tell(chart.cursor.idx); }],
      },
    }, data, box);
  }

  const box = document.createElement("div");

  function tell(index) {
    const [steps, , , mean, held] = columns();
    if (index < 0 || index >= steps.length) return;
    const parts = [`step ${steps[index].toLocaleString("en")}`];
    if (mean[index] !== null) parts.push(`training ${mean[index].toFixed(4)}`);
    if (held[index] !== null) parts.push(`held out ${held[index].toFixed(4)}`);
    said.textContent = parts.join(" · ");
  }

  async function zoom(low, high) {
    window_ = low === null ? null : [Math.max(0, low), Math.max(low + 2, high)];
    await load();
  }

  async function load() {
    const number = ++asked;
    const part = window_ ? `&from=${window_[0]}&to=${window_[1]}` : "";
    const answer = await fetch(`${figure.dataset.series}?points=${POINTS}${part}`);
    if (!answer.ok) throw new Error(await failure(answer));
    const fresh = await answer.json();
    if (number !== asked) return;
    values = fresh;
    if (values.training.step.length + values.held_out.length < 2) return;
    if (!figure.dataset.taken) {
      figure.dataset.taken = "1";
      figure.replaceChildren(box);
    }
    draw();
  }

  figure.addEventListener("keydown", event => {
    if (!values || event.ctrlKey || event.metaKey || event.altKey) return;
    const [steps] = columns();
    const [low, high] = window_ ?? [0, Math.max(values.steps, steps.at(-1) ?? 1)];
    const middle = at ?? (low + high) / 2;
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      const isRight = event.key === "ArrowRight"; // by step, since the columns are others after each load
      const next = at === null ? (isRight ? 0 : steps.length - 1) : isRight ? steps.findIndex(step => step > at) : steps.findLastIndex(step => step < at);
      if (next >= 0) at = steps[next];
      plot?.setCursor({left: plot.valToPos(at, "x"), top: 10});
      tell(steps.indexOf(at));
    } else if (event.key === "+" || event.key === "=") zoom(Math.round(middle - (high - low) / 4), Math.round(middle + (high - low) / 4));
    else if (event.key === "-") zoom(...(high - low >= values.steps ? [null, null] : [Math.round(low - (high - low) / 2), Math.round(high + (high - low) / 2)]));
    else if (event.key === "0" || event.key === "Escape") zoom(null, null);
    else return;
    event.preventDefault();
  });
  figure.addEventListener("dblclick", () => zoom(null, null));
  new ResizeObserver(() => { if (plot && figure.clientWidth) draw(); }).observe(figure);
  const repaint = () => plot?.redraw();
  addEventListener("themechange", repaint);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  load().catch(() => {});
  let wasLive = figure.dataset.live;
  figure.addEventListener("island:fresh", () => { // the last points come with the end
    if (wasLive) load().catch(() => {});
    wasLive = figure.dataset.live;
  });
}

const taken = new WeakSet();
function look() {
  const figure = document.querySelector("[data-island=curve]");
  if (figure && !taken.has(figure)) { taken.add(figure); island(figure); }
}
addEventListener("load", look);
setInterval(look, 1000); // the figure comes with the second step
