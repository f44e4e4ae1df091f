// Accuracy against sparsity, what it costs, learning curves, layers, mask overlap.
function drawAccuracy() {
  const rows = DATA.rows.filter((row) => row.accuracy !== null);
  const sparse = rows.filter((row) => row.level !== null);
  if (!sparse.length) return;
  const { node, tools } = section("accuracy", "Accuracy and sparsity", "Mean test accuracy over seeds; whiskers and the band of the dense net are one standard deviation. Methods at one sparsity stand side by side so that their whiskers can be told apart.");
  const hidden = new Set();
  const labels = DATA.labels.filter((label) => rows.some((row) => row.label === label));
  const values = sparse.map((row) => row.accuracy).sort((a, b) => a - b);
  const middle = values[Math.floor(values.length / 2)], top = values[values.length - 1];
  const far = values.length > 4 && middle - values[0] > 4 * (top - middle);
  let zoom = far ? "upper" : "all";
  if (far) tools.append(switcher("Accuracy axis", [{ value: "upper", text: "Upper part" }, { value: "all", text: "All points" }], zoom, (value) => { zoom = value; draw(); }));
  const list = legendHost(), host = el("div", { id: "accuracy-plot" });
  node.append(list, host);
  legend(list, labels, hidden, () => draw());
  const draw = live(() => {
    const width = widthOf(host), height = width > 800 ? 400 : 340, left = 58, right = 74, top = 34, bottom = 46;
    const shown = sparse.filter((row) => !hidden.has(row.label));
    const dense = rows.filter((row) => row.level === null && !hidden.has(row.label));
    const sd = (row) => row.accuracy_sd || 0;
    const ends = [...shown, ...dense].flatMap((row) => [row.accuracy - sd(row), row.accuracy + sd(row)]);
    if (!ends.length) { host.replaceChildren(el("p", { class: "empty" }, "All methods are hidden.")); return; }
    let low = lowest(ends), high = highest(ends);
    if (zoom === "upper") low = Math.max(low, 2 * middle - high - (high - middle) * 2);
    const pad = (high - low || 0.01) * 0.08;
    low = Math.max(0, low - pad); high = Math.min(1, high + pad);
    const levels = [...new Set(sparse.map((row) => row.level))].sort((a, b) => a - b);
    const asked = [...new Set(sparse.map((row) => row.sparsity_asked))].filter((level) => level !== null).sort((a, b) => a - b);
    const density = (s) => 1 - Math.min(s, 0.99999);
    const room = levels.length > 1 ? 0.09 * (width - left - right) : 0;
    // equal steps for equal ratios of kept weights
    const place = levels.length > 1 ? scale(density(levels[0]), density(levels[levels.length - 1]), left + room, width - right - room, true) : () => (left + width - right) / 2;
    const x = (s) => place(density(s));
    const y = scale(low, high, height - bottom, top);
    const { root, layer } = frame(host, {
      width, height, left, right, top, bottom, label: "Accuracy against sparsity, one line per method",
      x: { map: x, ticks: asked.length ? asked : levels, text: (s) => percent(s), label: "sparsity: fraction of zeros in the prunable layers" },
      y: { map: y, ticks: ticks(low, high, 7), text: (v) => percent(v), label: "accuracy" },
    });
    let above = -Infinity;
    for (const row of dense) {
      const at = y(row.accuracy);
      layer.append(svg("rect", { class: "band c0", x: left, width: width - left - right, y: y(Math.min(high, row.accuracy + sd(row))), height: Math.max(1, y(row.accuracy - sd(row)) - y(row.accuracy + sd(row))) }),
        withTip(svg("line", { class: "trace c0", x1: left, x2: width - right, y1: at, y2: at, "stroke-dasharray": styleOf(row.label).dash, tabindex: 0, role: "img", "aria-label": `${row.label}: ${points(row.accuracy)} %` }), row.label, pointTip(row)));
      if (at - above > 13) root.append(svg("text", { x: width - right + 8, y: at + 4 }, short(row.label, 10)));
      above = at;
    }
    const order = labels.filter((label) => shown.some((row) => row.label === label));
    const gap = Math.min(11, asked.length > 1 ? (0.62 * (x(asked[1]) - x(asked[0]))) / order.length : 40, order.length > 1 && room ? (1.6 * room) / order.length : 11);
    const under = []; // where numbers of points off the axis stand
    order.forEach((label, index) => {
      const style = styleOf(label), shift = (index - (order.length - 1) / 2) * gap;
      const mine = shown.filter((row) => row.label === label).sort((a, b) => a.level - b.level);
      const group = svg("g", { class: `c${style.colour}`, "data-label": label });
      group.append(svg("path", { class: "trace", opacity: 0.75, "stroke-dasharray": style.dash, d: mine.map((row, n) => `${n ? "L" : "M"}${x(row.level) + shift},${y(row.accuracy)}`).join("") }));
      for (const row of mine) {
        const at = x(row.level) + shift, below = row.accuracy < low;
        const face = { tabindex: 0, role: "img", "data-value": row.accuracy, "aria-label": `${label} at ${percent(row.level)}: ${points(row.accuracy)} % plus or minus ${points(row.accuracy_sd)}` };
        const title = `${label} at ${percent(row.level)}`;
        if (below) { // off the zoomed axis: an arrow with the number
          const rise = 14 * under.filter((other) => Math.abs(other - at) < 52).length;
          under.push(at);
          root.append(withTip(svg("g", { class: `c${style.colour}`, ...face }, svg("path", { class: "mark", d: MARKS.down(6), transform: `translate(${at} ${height - bottom - 8})` }),
            svg("text", { x: at - 10, y: height - bottom - 5 - rise, "text-anchor": "end" }, `${points(row.accuracy)}`)), title, pointTip(row)));
          continue;
        }
        const mark = svg("g", face);
        if (row.accuracy_sd) for (const [x1, x2, y1, y2] of [[at, at, -1, 1], [at - 4, at + 4, 1, 1], [at - 4, at + 4, -1, -1]])
          mark.append(svg("line", { class: "whisker", x1, x2, y1: y(row.accuracy + y1 * sd(row)), y2: y(row.accuracy + y2 * sd(row)) }));
        mark.append(svg("path", { class: "mark", d: MARKS[style.shape](5.4), transform: `translate(${at} ${y(row.accuracy)})` }), svg("circle", { r: 12, cx: at, cy: y(row.accuracy), fill: "none", "pointer-events": "all" }));
        group.append(withTip(mark, title, pointTip(row)));
      }
      layer.append(group);
    });
  });
}
const pointTip = (row) => [
  ["accuracy", `${points(row.accuracy)}${row.accuracy_sd === null ? "" : ` \u00b1 ${points(row.accuracy_sd)}`} %`],
  ["seeds", row.n === row.total ? String(row.n) : `${row.n} of ${row.total}`],
  ["FLOPs", times(row.flops_ratio)], ["parameters", si(row.parameters)],
  ...(row.against.static ? [["vs static", `${points(row.against.static.mean, true)}${row.against.static.clear ? "*" : ""}`]] : []),
];

function drawCost() {
  const { node, tools } = section("cost", "Cost", "What each method takes, on average over its seeds. FLOPs, parameters and bytes are counted from the masks; time and memory were measured on the machine named above.");
  const levels = [...new Set(DATA.rows.map((row) => row.sparsity_asked))].filter((level) => level !== null);
  let level = levels.length ? levels[levels.length - 1] : null;
  if (levels.length > 1) tools.append(switcher("Sparsity", levels.map((value) => ({ value: String(value), text: percent(value) })), String(level), (value) => { level = Number(value); draw(); }));
  const timed = DATA.rows.every((row) => row.n === 0 || row.cpu_seconds !== null); // older runs have the clock's time only
  const nameWidth = Math.min(150, Math.max(98, 14 + 7 * highest(DATA.labels.map((label) => label.length))));
  const charts = [
    ["FLOPs of inference", (r) => r.flops_ratio, times, (r) => [["FLOPs", si(r.flops)]]],
    ["FLOPs of training", (r) => r.training_flops_ratio, times, (r) => [["FLOPs", si(r.training_flops)]]],
    ["Parameters kept", (r) => r.parameters, (v) => si(v), (r) => [["parameters", whole(r.parameters)], ["of dense", percent(r.parameters_ratio, 2)]]],
    ["Size, smallest format", (r) => r.bytes, (v) => si(v, "B"), (r) => ["dense", "bitmask", "csr"].filter((kind) => r.storage_bytes[kind] !== undefined).map((kind) => [kind === "csr" ? "CSR" : kind === "bitmask" ? "bit mask" : kind, si(r.storage_bytes[kind], "B")])],
    timed ? ["CPU time of a run, measured", (r) => r.cpu_seconds, duration, (r) => [["of all cores", duration(r.cpu_seconds)], ["on the clock", duration(r.seconds)]]]
      : ["Time of a run, measured", (r) => r.seconds, duration, (r) => [["seconds", tidy(r.seconds)]]],
    ["Peak memory, measured", (r) => r.peak_memory, (v) => si(v, "B"), (r) => [["bytes", whole(r.peak_memory)]]],
  ].map(([title, value, text, more]) => ({ title, value, text, more, host: el("div", { "data-chart": title }) }));
  node.append(el("div", { class: "small" }, charts.map((chart) => el("div", {}, el("h3", {}, chart.title), chart.host))));
  const draw = live(() => {
    const rows = DATA.rows.filter((row) => row.n > 0 && (row.sparsity_asked === null || row.sparsity_asked === level)).sort((a, b) => DATA.labels.indexOf(a.label) - DATA.labels.indexOf(b.label));
    for (const { title, value, text, more, host } of charts) {
      const present = rows.filter((row) => value(row) !== null);
      if (!present.length) { host.replaceChildren(el("p", { class: "empty" }, "Not recorded.")); continue; }
      bars(host, present.map((row) => ({ name: row.label, value: value(row), text: text(value(row)), colour: `c${styleOf(row.label).colour}`, tip: more(row), title: row.label })),
        { highest: highest(present.map(value)), label: title, rowHeight: 22, nameWidth, valueWidth: 76 });
    }
  });
}

function drawCurves() {
  const runs = DATA.runs.filter((run) => run.train.steps.length || Object.keys(run.evals).length);
  if (!runs.length) return;
  const { node, tools } = section("curves", "Learning curves", `Training loss is a centred moving average over ${Math.max(...runs.map((run) => run.window))} steps. A line per run; choose sparsity and seed, and click a method to hide it.`);
  const levels = [...new Set(runs.map((run) => run.sparsity))].filter((level) => level !== null).sort((a, b) => a - b);
  const seeds = [...new Set(runs.map((run) => run.seed))].filter((seed) => seed !== null).sort((a, b) => a - b);
  const splits = [...new Set(runs.flatMap((run) => Object.keys(run.evals)))].sort();
  const hidden = new Set();
  let level = levels.length ? String(levels[levels.length - 1]) : "all", seed = seeds.length ? String(seeds[0]) : "all", log = levels.length > 0;
  if (levels.length > 1) {
    const pick = selector("Sparsity", "curves-sparsity", [...levels.map((value) => ({ value: String(value), text: percent(value) })), { value: "all", text: "all" }], (value) => { level = value; draw(); });
    pick.select.value = level;
    tools.append(pick.node);
  }
  if (seeds.length > 1) tools.append(selector("Seed", "curves-seed", [...seeds.map((value) => ({ value: String(value), text: String(value) })), { value: "all", text: "all" }], (value) => { seed = value; draw(); }).node);
  tools.append(switcher("Loss axis", [{ value: "log", text: "Log" }, { value: "linear", text: "Linear" }], log ? "log" : "linear", (value) => { log = value === "log"; draw(); }));
  const list = legendHost(), loss = el("div", { id: "loss-plot" });
  const accuracy = splits.map((split) => ({ split, host: el("div", { id: `eval-${splits.indexOf(split)}` }) }));
  node.append(list, el("div", { class: "pair" }, loss, accuracy.map(({ host }) => host)));
  const labels = DATA.labels.filter((label) => runs.some((run) => run.label === label));
  if (labels.length > 1) legend(list, labels, hidden, () => draw());
  const draw = live(() => {
    const chosen = runs.filter((run) => (level === "all" || run.sparsity === null || String(run.sparsity) === level) && (seed === "all" || String(run.seed) === seed) && !hidden.has(run.label));
    const name = (run) => (level !== "all" && seed !== "all" ? run.label : runText(run));
    const faint = chosen.length > 10;
    lineChart(loss, chosen.filter((run) => run.train.steps.length).map((run) => ({ name: name(run), label: run.label, x: run.train.steps, y: run.train.loss, faint })),
      { yText: tidy, yLabel: "training loss", log, label: "Training loss over steps" });
    for (const { split, host } of accuracy) lineChart(host, chosen.filter((run) => run.evals[split]).map((run) => ({ name: name(run), label: run.label, x: run.evals[split].steps, y: run.evals[split].accuracy, faint })),
      { yText: (v, exact) => (exact ? `${points(v)} %` : percent(v)), yLabel: `accuracy on ${split}`, label: `Accuracy on ${split} over steps`, marks: true });
  });
}

function drawLayers(parent) {
  const runs = DATA.runs.filter((run) => run.network !== null);
  if (!runs.length) return;
  const { node, tools } = section("layers", "Layers", "How many weights of each sparse layer are kept. The dashed line is the density asked for over all.", parent);
  const host = el("div", { id: "density-plot" });
  let run = telling(runs);
  const pick = selector("Run", "density-run", runOptions(runs), (value) => { run = DATA.runs[Number(value)]; draw(); });
  pick.select.value = String(DATA.runs.indexOf(run));
  tools.append(pick.node);
  node.append(host);
  const draw = live(() => {
    const layers = DATA.networks[run.network].map((layer, index) => ({ ...layer, kept: run.kept[index], numel: layer.shape.reduce((a, b) => a * b, 1) }));
    const longest = Math.max(...layers.map((layer) => layer.name.length));
    bars(host, layers.map((layer) => ({
      name: layer.name, value: layer.numel ? layer.kept / layer.numel : 0, text: percent(layer.kept / (layer.numel || 1), 2), colour: "plain", title: layer.name,
      tip: [["shape", layer.shape.join(" \u00d7 ")], ["kept", whole(layer.kept)], ["of", whole(layer.numel)], ["sparsity", percent(1 - layer.kept / (layer.numel || 1), 2)]],
    })), { highest: 1, ticks: [0, 0.25, 0.5, 0.75, 1], tickText: (v) => percent(v), label: `Density of the layers of ${runText(run)}`, nameWidth: Math.min(190, 26 + 7 * longest), valueWidth: 70, rowHeight: layers.length > 30 ? 20 : 26,
      line: run.sparsity === null ? null : { value: 1 - run.sparsity, text: `asked: ${percent(1 - run.sparsity)} kept` } });
  });
}

function drawOverlap(parent) {
  if (!DATA.overlaps.length) return;
  const { node, tools } = section("overlap", "Mask overlap", "Of all weights that either of two masks keeps, the share that both keep (Jaccard index). Point at a cell to see what chance alone would give.", parent);
  const host = el("div", { id: "overlap-plot" });
  let matrix = DATA.overlaps[0];
  tools.append(selector("Show", "overlap-group", DATA.overlaps.map(({ title }, index) => ({ value: String(index), text: title })), (value) => { matrix = DATA.overlaps[Number(value)]; draw(); }).node);
  node.append(host);
  const draw = live(() => {
    const width = widthOf(host), count = matrix.names.length;
    const name = Math.min(130, 16 + 7.2 * Math.max(...matrix.names.map((text) => text.length)));
    const heading = Math.max(...matrix.names.map((text) => Math.min(12, text.length))) * 7.2 + 6, tilted = heading > (width - name - 8) / count;
    const cell = Math.max(11, Math.min(84, (width - name - (tilted ? 34 : 8)) / count)), tall = Math.min(cell, 46), top = tilted ? 74 : 26; // the last tilted name leans out
    const root = svg("svg", { class: "plot heat", viewBox: `0 0 ${width} ${top + count * tall + 6}`, role: "img", "aria-label": matrix.title });
    matrix.names.forEach((text, row) => {
      root.append(svg("text", { class: "name", x: name - 8, y: top + row * tall + tall / 2 + 4, "text-anchor": "end" }, short(text, Math.floor(name / 7.2))));
      const x = name + row * cell + cell / 2;
      root.append(tilted ? svg("text", { class: "name", transform: `translate(${x + 4} ${top - 8}) rotate(-50)` }, short(text, 12)) : svg("text", { class: "name", x, y: top - 9, "text-anchor": "middle" }, short(text, 12)));
      matrix.names.forEach((other, column) => {
        const value = matrix.values[row][column], chance = matrix.chance[row][column], self = row === column;
        const group = svg("g", { tabindex: self ? null : 0, role: "img", "data-value": value, "aria-label": `${text} and ${other}: ${value === null ? "not comparable" : value.toFixed(2)}` });
        group.append(svg("rect", { class: self || value === null ? "self" : null, x: name + column * cell + 1, y: top + row * tall + 1, width: cell - 2, height: tall - 2, rx: 4, "fill-opacity": self || value === null ? 1 : 0.08 + 0.92 * value }));
        if (cell >= 30) group.append(svg("text", { class: !self && value > 0.52 ? "on" : null, x: name + (column + 0.5) * cell, y: top + (row + 0.5) * tall + 4, "text-anchor": "middle", opacity: self ? 0.45 : 1 }, value === null ? NONE : self ? "1" : value.toFixed(2)));
        root.append(self ? group : withTip(group, `${text} and ${other}`, value === null ? [["different layers", ""]] : [["both keep, of either", percent(value, 2)], ["by chance", percent(chance, 2)]]));
      });
    });
    host.replaceChildren(root);
  });
}
