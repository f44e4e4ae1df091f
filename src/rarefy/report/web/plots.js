// Plots: a frame with axes, lines with a cross-hair, horizontal bars, legends, selectors, sections.
const redraws = [];
let drawnWidth = window.innerWidth;
let pending = 0;
window.addEventListener("resize", () => {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => {
    if (window.innerWidth !== drawnWidth) { drawnWidth = window.innerWidth; redraws.forEach((draw) => draw()); }
  });
});
function live(draw) { redraws.push(draw); draw(); return draw; }
const widthOf = (host) => Math.max(260, Math.floor(host.clientWidth || 600));

function section(id, title, lead, parent) {
  const tools = el("div", { class: "tools" });
  const node = el("section", { id, "aria-labelledby": `${id}-title` },
    el("div", { class: "head" }, el("h2", { id: `${id}-title` }, title), tools), lead ? el("p", { class: "lead" }, lead) : null);
  (parent || document.getElementById("main")).append(node);
  document.getElementById("nav").append(el("a", { href: `#${id}` }, title));
  return { node, tools };
}

// options: [{value, text, group?}]
function selector(name, id, options, onchange) {
  const select = el("select", { id, onchange: () => onchange(select.value) });
  const groups = new Map();
  for (const { value, text, group } of options) {
    let host = select;
    if (group) {
      if (!groups.has(group)) { groups.set(group, el("optgroup", { label: group })); select.append(groups.get(group)); }
      host = groups.get(group);
    }
    host.append(el("option", { value }, text));
  }
  return { node: el("label", {}, name, select), select };
}
function switcher(name, options, chosen, onchange) {
  const buttons = options.map(({ value, text }) => el("button", {
    type: "button", "data-value": value, "aria-pressed": String(value === chosen),
    onclick: () => { buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.value === value))); onchange(value); },
  }, text));
  return el("div", { class: "buttons", role: "group", "aria-label": name }, buttons);
}
function legend(host, labels, hidden, redraw) {
  const items = labels.map((label) => {
    const button = el("button", { type: "button", "data-label": label, title: label, "aria-pressed": String(!hidden.has(label)), onclick: () => {
      if (hidden.has(label)) hidden.delete(label); else hidden.add(label);
      button.setAttribute("aria-pressed", String(!hidden.has(label)));
      redraw();
    } }, swatch(label), el("span", {}, label));
    return el("li", {}, button);
  });
  host.replaceChildren(...items);
}
const legendHost = () => el("ul", { class: "legend", "aria-label": "Show or hide methods" });
const runText = (run) => `${run.label}${run.sparsity === null ? "" : ` at ${percent(run.sparsity)}`}${run.seed === null ? "" : `, seed ${run.seed}`}`;
const runTitle = (run) => runText(run) + (run.status === "finished" ? "" : ` (${run.status})`);
const runOptions = (runs) => runs.map((run) => ({ value: String(DATA.runs.indexOf(run)), text: runTitle(run), group: run.label }));
// a run that shows the most: a dynamic one where there is one
function telling(runs) {
  for (const method of ["rigl", "set", "gradual"]) {
    const found = runs.filter((run) => run.facts.method === method);
    if (found.length) return found[0];
  }
  return runs.find((run) => run.sparsity !== null) || runs[0];
}

let clips = 0;
// Axes and grid; x and y: {map, ticks, text, label}; returns the layer to draw in, clipped to the plot's area.
function frame(host, { width, height, left, right, top, bottom, x, y, label }) {
  const root = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const clip = `clip${(clips += 1)}`;
  root.append(svg("defs", {}, svg("clipPath", { id: clip }, svg("rect", { x: left - 8, y: top - 8, width: width - left - right + 16, height: height - top - bottom + 9 }))));
  for (const tick of y.ticks) {
    const at = y.map(tick);
    root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at }), svg("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, y.text(tick)));
  }
  root.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  let last = -Infinity;
  for (const tick of x.ticks) {
    const at = x.map(tick), text = x.text(tick);
    if (at - last < 7 * text.length + 10) continue; // labels that would touch
    last = at;
    root.append(svg("line", { class: "axis", x1: at, x2: at, y1: height - bottom, y2: height - bottom + 5 }), svg("text", { x: at, y: height - bottom + 19, "text-anchor": "middle" }, text));
  }
  if (x.label) root.append(svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, x.label));
  if (y.label) root.append(svg("text", { x: left - 8, y: top - 14, "text-anchor": "start", transform: `translate(${-left + 8} 0)` }, y.label));
  const layer = svg("g", { "clip-path": `url(#${clip})` });
  root.append(layer);
  host.replaceChildren(root);
  return { root, layer };
}

function pathOf(xs, ys, x, y) {
  let text = "", pen = false;
  xs.forEach((value, index) => {
    if (ys[index] === null || !Number.isFinite(ys[index])) { pen = false; return; }
    text += `${pen ? "L" : "M"}${x(value).toFixed(1)},${y(ys[index]).toFixed(1)}`;
    pen = true;
  });
  return text;
}

// series: [{name, label, x, y, faint}]; options: yText, yLabel, log, height, area
function lineChart(host, series, { yText, yLabel, log, height = 300, label, marks, zero }) {
  const width = widthOf(host);
  const values = finite(series.flatMap((one) => one.y)).filter((value) => !log || value > 0);
  if (!values.length) { host.replaceChildren(el("p", { class: "empty" }, "Nothing was recorded for this choice.")); return; }
  const left = 58, right = 14, top = 30, bottom = 42;
  const steps = series.flatMap((one) => one.x);
  let low = lowest(values), high = highest(values);
  if (log) { low /= 1.08; high *= 1.08; } else {
    const pad = (high - low || Math.abs(high) || 1) * 0.06;
    if (zero) low = 0; else low -= pad;
    high += pad;
  }
  const last = highest(steps), first = lowest(steps) < last ? lowest(steps) : 0; // a single step says nothing about its scale
  const room = (last - first || 1) * 0.015;
  const x = scale(Math.max(0, first - room), last + room, left, width - right);
  const y = scale(low, high, height - bottom, top, log);
  const rows = Math.max(3, Math.round(height / 60));
  const { root, layer } = frame(host, {
    width, height, left, right, top, bottom, label,
    x: { map: x, ticks: ticks(x.from, x.to, Math.max(2, Math.round(width / 110))), text: (v) => whole(v), label: "optimizer step" },
    y: { map: y, ticks: log ? logTicks(low, high, rows) : ticks(low, high, rows), text: yText, label: yLabel },
  });
  for (const one of series) {
    const style = styleOf(one.label);
    layer.append(svg("path", { class: `trace c${style.colour}`, "data-name": one.name, "stroke-dasharray": style.dash, "stroke-width": 1.8, opacity: one.faint ? 0.7 : 1, d: pathOf(one.x, log ? one.y.map((v) => (v > 0 ? v : null)) : one.y, x, y) }));
    if (marks && one.x.length <= 40) one.x.forEach((value, index) => {
      if (one.y[index] !== null) layer.append(svg("path", { class: `mark c${style.colour}`, d: MARKS[style.shape](3.6), transform: `translate(${x(value)} ${y(one.y[index])})` }));
    });
  }
  const hair = svg("line", { class: "hair", y1: top, y2: height - bottom, visibility: "hidden" });
  const dots = svg("g", {});
  root.append(hair, dots);
  const area = svg("rect", { x: left, y: top, width: width - left - right, height: height - top - bottom, fill: "none", "pointer-events": "all" });
  area.addEventListener("mousemove", (event) => {
    const box = root.getBoundingClientRect();
    const at = x.from + (((event.clientX - box.left) * (width / box.width) - left) / (width - left - right)) * (x.to - x.from);
    const found = series.map((one) => ({ one, index: nearestIndex(one.x, at) })).filter(({ one, index }) => index >= 0 && one.y[index] !== null);
    if (!found.length) return;
    const step = found.map(({ one, index }) => one.x[index]).reduce((a, b) => (Math.abs(b - at) < Math.abs(a - at) ? b : a));
    found.sort((a, b) => b.one.y[b.index] - a.one.y[a.index]);
    hair.setAttribute("x1", x(step)); hair.setAttribute("x2", x(step)); hair.setAttribute("visibility", "visible");
    dots.replaceChildren(...found.map(({ one, index }) => svg("circle", { class: `mark c${styleOf(one.label).colour}`, r: 4, cx: x(one.x[index]), cy: y(one.y[index]) })));
    const rows = found.slice(0, 16).map(({ one, index }) => [one.name, yText(one.y[index], true)]);
    if (found.length > 16) rows.push([`and ${found.length - 16} more`, "", true]);
    showTip(event, `Step ${whole(step)}`, rows);
  });
  area.addEventListener("mouseleave", () => { hair.setAttribute("visibility", "hidden"); dots.replaceChildren(); hideTip(); });
  root.append(area);
}
function nearestIndex(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (sorted[middle] < value) low = middle; else high = middle; }
  return high < 0 ? -1 : Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high;
}

// rows: [{name, value (bar's length), text, colour (class), tip: [[..]], title, mute}]; line: {value, text} drawn across
function bars(host, rows, { highest: most, ticks: marks, tickText, line, label, nameWidth = 110, valueWidth = 74, rowHeight = 24 }) {
  const width = widthOf(host), top = line ? 22 : 8, bottom = marks ? 26 : 4;
  const height = top + rows.length * rowHeight + bottom;
  const x = scale(0, most || 1, nameWidth, width - valueWidth);
  const root = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const tick of marks || []) root.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: top, y2: height - bottom }), svg("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, tickText(tick)));
  rows.forEach((row, index) => {
    const y = top + index * rowHeight, thick = Math.min(16, rowHeight - 6);
    const group = svg("g", { class: row.colour, "data-name": row.name, "data-value": row.value, tabindex: 0, role: "img", "aria-label": `${row.name}: ${row.text}` });
    group.append(svg("rect", { x: 0, y, width, height: rowHeight, fill: "none", "pointer-events": "all" }));
    group.append(svg("text", { class: "name", x: nameWidth - 10, y: y + rowHeight / 2 + 4, "text-anchor": "end" }, short(row.name, Math.floor((nameWidth - 10) / 7))));
    group.append(svg("rect", { class: "rail", x: x(0), y: y + (rowHeight - thick) / 2, width: x.end - x.start, height: thick, rx: 3 }));
    if (row.value !== null) group.append(svg("rect", { class: "bar", x: x(0), y: y + (rowHeight - thick) / 2, width: Math.max(row.value > 0 ? 1.5 : 0, x(Math.min(row.value, most)) - x(0)), height: thick, rx: 3 }));
    group.append(svg("text", { class: "strong", x: width - valueWidth + 8, y: y + rowHeight / 2 + 4 }, row.text));
    root.append(withTip(group, row.title || row.name, row.tip || []));
  });
  if (line) root.append(svg("line", { class: "chance", x1: x(line.value), x2: x(line.value), y1: top - 4, y2: height - bottom }),
    svg("text", { x: x(line.value), y: top - 9, "text-anchor": x(line.value) > width * 0.6 ? "end" : x(line.value) < nameWidth + 60 ? "start" : "middle" }, line.text));
  host.replaceChildren(root);
}
