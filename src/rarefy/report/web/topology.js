// Which weights were dropped and grown, when and where.
function drawTopology() {
  const runs = DATA.runs.filter((run) => run.topology !== null);
  if (!runs.length) return;
  const { node, tools } = section("topology", "Topology", "Every update of the masks: weights grown above the line, weights dropped below it. Underneath, the share of weights kept, and where the changes were made.");
  const changes = (one) => [...one.topology.dropped, ...one.topology.grown].flat().reduce((a, b) => a + (b || 0), 0);
  const moving = runs.filter((one) => changes(one) > 0);
  let run = telling(moving.length ? moving : runs), layer = "all";
  const pick = selector("Run", "topology-run", runOptions(runs), (value) => { run = DATA.runs[Number(value)]; layer = "all"; offer(); draw(); });
  pick.select.value = String(DATA.runs.indexOf(run));
  const layers = selector("Layer", "topology-layer", [], (value) => { layer = value; draw(); });
  tools.append(pick.node, layers.node);
  const events = el("div", { id: "topology-plot" }), strip = el("div", { id: "topology-layers" }), totals = el("p", { class: "key", id: "topology-total" });
  node.append(events, strip, totals);
  function offer() {
    layers.select.replaceChildren(el("option", { value: "all" }, "all layers"), ...run.topology.layers.map((name, index) => el("option", { value: String(index) }, name)));
  }
  offer();
  const draw = live(() => { if (changes(run)) { drawEvents(events, run, layer); drawStrip(strip, run); } else { events.replaceChildren(el("p", { class: "empty" }, "No update changed a weight of this run.")); strip.replaceChildren(); } totals.textContent = totalText(run, layer); });
}

const rowsOf = (topology, layer) => (layer === "all" ? topology.layers.map((_, index) => index) : [Number(layer)]);
const summed = (table, rows, column) => rows.reduce((sum, row) => sum + (table[row][column] || 0), 0);

function totalText(run, layer) {
  const { topology } = run, rows = rowsOf(topology, layer);
  const total = (table) => topology.steps.reduce((sum, _, column) => sum + summed(table, rows, column), 0) * topology.joined;
  const count = topology.steps.length * topology.joined;
  const about = topology.joined > 1 ? `, about; each column stands for ${topology.joined} updates` : "";
  return `${runText(run)}: ${whole(total(topology.dropped))} weights dropped and ${whole(total(topology.grown))} grown in ${count} update${count === 1 ? "" : "s"}${about}.`;
}

// kept weights over time, a layer without an event keeping what it had
function keptShares(run, rows) {
  const { topology } = run;
  const network = run.network === null ? [] : DATA.networks[run.network];
  const sizes = rows.map((row) => { const found = network.find((one) => one.name === topology.layers[row]); return found ? found.shape.reduce((a, b) => a * b, 1) : null; });
  if (sizes.includes(null)) return null;
  const size = sizes.reduce((a, b) => a + b, 0), now = rows.map(() => null);
  return topology.steps.map((_, column) => {
    rows.forEach((row, index) => { now[index] = topology.kept[row][column] ?? now[index]; });
    return now.includes(null) || !size ? null : now.reduce((a, b) => a + b, 0) / size;
  });
}

function stepsAxis(topology, left, width) {
  const { steps } = topology, first = steps.length > 1 ? steps[0] - (steps[1] - steps[0]) : 0, last = steps[steps.length - 1];
  return scale(Math.max(0, Math.min(first, steps[0])), last + (steps.length > 1 ? (steps[1] - steps[0]) * 0.6 : Math.max(1, last * 0.1)), left, width);
}

function drawEvents(host, run, layer) {
  const { topology } = run, rows = rowsOf(topology, layer);
  const grown = topology.steps.map((_, column) => summed(topology.grown, rows, column)), dropped = topology.steps.map((_, column) => summed(topology.dropped, rows, column));
  const shares = keptShares(run, rows);
  const width = widthOf(host), left = 70, right = 16, top = 30, bottom = 40, upper = 210, lower = shares ? 110 : 0, height = top + upper + (lower ? 34 + lower : 0) + bottom;
  const x = stepsAxis(topology, left, width - right);
  const most = Math.max(1, ...grown, ...dropped), onlyDrops = !grown.some(Boolean), onlyGrows = !dropped.some(Boolean);
  const y = scale(onlyGrows ? 0 : -most * 1.06, onlyDrops ? 0 : most * 1.06, top + upper, top);
  const { root } = frame(host, {
    width, height, left, right, top, bottom: height - top - upper, label: `Weights grown and dropped at each update of ${runText(run)}`,
    x: { map: x, ticks: lower ? [] : ticks(x.from, x.to, Math.max(2, Math.round(width / 110))), text: (v) => whole(v) },
    y: { map: y, ticks: ticks(y.from, y.to, 5), text: (v) => (Math.abs(v) >= 1e5 ? si(Math.abs(v)) : whole(Math.abs(v))), label: topology.joined > 1 ? "weights per update (mean)" : "weights per update" },
  });
  const swatches = [["grown", "grown"], ["dropped", "dropped"]].filter(([kind]) => (kind === "grown" ? !onlyDrops : !onlyGrows));
  swatches.forEach(([kind, text], index) => root.append(svg("rect", { class: `bar ${kind}`, x: width - right - (swatches.length - index) * 86 + 12, y: 7, width: 11, height: 11, rx: 2 }), svg("text", { x: width - right - (swatches.length - index) * 86 + 29, y: 17 }, text)));
  const thick = Math.max(1, Math.min(22, ((width - left - right) / topology.steps.length) * 0.62));
  root.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(0), y2: y(0) }));
  topology.steps.forEach((step, column) => {
    const at = x(step), group = svg("g", { "data-step": step });
    if (grown[column]) group.append(svg("rect", { class: "bar grown", x: at - thick / 2, width: thick, y: y(grown[column]), height: y(0) - y(grown[column]), rx: Math.min(2, thick / 3) }));
    if (dropped[column]) group.append(svg("rect", { class: "bar dropped", x: at - thick / 2, width: thick, y: y(0), height: y(-dropped[column]) - y(0), rx: Math.min(2, thick / 3) }));
    group.append(svg("rect", { x: at - thick * 0.8, width: thick * 1.6, y: top, height: height - top - bottom, fill: "none", "pointer-events": "all" }));
    root.append(withTip(group, `Step ${whole(step)}`, [["grown", whole(grown[column])], ["dropped", whole(dropped[column])], ...(shares && shares[column] !== null ? [["kept", percent(shares[column], 2)]] : [])]));
  });
  if (!lower) return;
  const values = finite(shares), start = top + upper + 34;
  if (!values.length) return;
  const high = highest(values), ky = scale(0, Math.min(1, high * 1.12) || 1, start + lower, start);
  for (const tick of ticks(0, ky.to, 3)) root.prepend(svg("line", { class: "grid", x1: left, x2: width - right, y1: ky(tick), y2: ky(tick) }), svg("text", { x: left - 8, y: ky(tick) + 4, "text-anchor": "end" }, percent(tick)));
  root.append(svg("text", { x: 0, y: start - 12 }, "weights kept"), svg("path", { class: "trace plain", "pointer-events": "none", d: pathOf(topology.steps, shares, x, ky) }));
  if (values.length < 3) topology.steps.forEach((step, at) => { if (shares[at] !== null) root.append(svg("circle", { class: "mark plain", r: 4, cx: x(step), cy: ky(shares[at]), "pointer-events": "none" })); });
  root.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: start + lower, y2: start + lower }));
  for (const tick of ticks(x.from, x.to, Math.max(2, Math.round(width / 110)))) root.append(svg("line", { class: "axis", x1: x(tick), x2: x(tick), y1: start + lower, y2: start + lower + 5 }), svg("text", { x: x(tick), y: start + lower + 19, "text-anchor": "middle" }, whole(tick)));
  root.append(svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "optimizer step"));
}

// layer x step: the share of a layer's kept weights that an update exchanged, at most 100 columns
function drawStrip(host, run) {
  const { topology } = run, count = topology.steps.length, joined = Math.ceil(count / 100), columns = Math.ceil(count / joined);
  const share = topology.layers.map((_, row) => Array.from({ length: columns }, (__, column) => {
    let sum = 0, used = 0;
    for (let at = column * joined; at < Math.min(count, (column + 1) * joined); at += 1) {
      const kept = topology.kept[row][at];
      if (kept === null || topology.dropped[row][at] === null) continue;
      sum += Math.max(topology.dropped[row][at], topology.grown[row][at]) / Math.max(1, kept + topology.dropped[row][at]); used += 1;
    }
    return used ? sum / used : null;
  }));
  const most = highest(finite(share.flat())) || 1;
  const width = widthOf(host), left = Math.min(190, 26 + 7 * Math.max(...topology.layers.map((name) => name.length))), right = 16;
  const tall = topology.layers.length > 20 ? 15 : 24, top = 44, wide = (width - left - right) / columns;
  const root = svg("svg", { class: "plot heat", viewBox: `0 0 ${width} ${top + tall * topology.layers.length + 26}`, role: "img", "aria-label": "Share of each layer's weights exchanged at each update" });
  root.append(svg("text", { x: 0, y: 30 }, `share of a layer\u2019s weights that an update changed (strongest colour: ${percent(most, 1)})`));
  topology.layers.forEach((name, row) => {
    root.append(svg("text", { class: "name", x: left - 8, y: top + row * tall + tall / 2 + 4, "text-anchor": "end" }, short(name, Math.floor(left / 7))));
    share[row].forEach((value, column) => {
      const step = topology.steps[Math.min(count, (column + 1) * joined) - 1];
      const cell = svg("rect", { class: value === null ? "self" : null, x: left + column * wide, y: top + row * tall, width: Math.max(0.5, wide - (wide > 4 ? 1 : 0)), height: tall - 1, "fill-opacity": value === null ? 1 : 0.05 + 0.95 * (value / most) });
      root.append(withTip(cell, name, [["step", whole(step)], ["changed", value === null ? "no update" : percent(value, 2)]]));
    });
  });
  root.append(svg("text", { x: left, y: top + tall * topology.layers.length + 17 }, `step ${whole(topology.steps[0])}`), svg("text", { x: width - right, y: top + tall * topology.layers.length + 17, "text-anchor": "end" }, `step ${whole(topology.steps[count - 1])}`));
  host.replaceChildren(root);
}
