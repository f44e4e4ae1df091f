// The leaderboard: sortable by any column, best values marked at each sparsity, problems listed under it.
const two = (main, small) => [main, small ? el("small", {}, small) : null];
function againstCell(row, name) {
  const found = row.against[name];
  if (!found) return row.method === name ? el("span", { class: "no" }, "baseline") : el("span", { class: "no" }, NONE);
  const main = points(found.mean, true) + (found.clear ? "*" : "");
  return two(main, found.low === null ? `${found.n} pair` : `[${points(found.low, true)}, ${points(found.high, true)}]`);
}
function againstTip(row, name) {
  const found = row.against[name];
  if (!found) return null;
  const p = (value) => (value === null ? NONE : value < 1e-4 ? "< 0.0001" : value.toFixed(4));
  return `${row.label} minus ${name}, ${found.n} seeds in common; p ${p(found.p)}, corrected for the number of methods (Holm) ${p(found.p_holm)}`;
}
const up = 1, down = -1; // which way is better
const FEW = 12; // runs that did not finish and are listed at once
const COLUMNS = [
  { key: "label", text: "Method", value: (r) => r.label, cell: (r) => [swatch(r.label), r.label] },
  { key: "sparsity", text: "Sparsity", value: (r) => r.level ?? 0, cell: (r) => r.sparsity_asked === null ? two(percent(r.level ?? 0, 2), r.level === null ? null : "its own") : two(percent(r.sparsity_asked), r.sparsity === 0 && r.parameters_ratio < 1 ? "smaller net" : r.sparsity !== null && Math.abs(r.sparsity - r.sparsity_asked) > 5e-6 ? `got ${percent(r.sparsity, 2)}` : null),
    tip: "fraction of zeros asked for; below it what the prunable layers really have" },
  { key: "accuracy", text: "Accuracy, %", better: up, value: (r) => r.accuracy, cell: (r) => [points(r.accuracy)], after: (r) => (r.accuracy_sd === null ? null : el("span", { class: "sd" }, ` \u00b1 ${points(r.accuracy_sd)}`)), tip: "mean and standard deviation over seeds" },
  { key: "n", text: "Seeds", value: (r) => r.n, cell: (r) => (r.n === r.total ? String(r.n) : `${r.n} of ${r.total}`), tip: "finished runs" },
  { key: "static", text: "vs static", value: (r) => r.against.static?.mean ?? null, cell: (r) => againstCell(r, "static"), cellTip: (r) => againstTip(r, "static"), tip: "accuracy minus that of the static random mask, paired by seed, with its 95 % interval" },
  { key: "small-dense", text: "vs small dense", value: (r) => r.against["small-dense"]?.mean ?? null, cell: (r) => againstCell(r, "small-dense"), cellTip: (r) => againstTip(r, "small-dense"), tip: "accuracy minus that of a narrower dense net of the same size, paired by seed, with its 95 % interval" },
  { key: "flops_ratio", text: "FLOPs", better: down, value: (r) => r.flops_ratio, cell: (r) => times(r.flops_ratio), after: (r) => el("small", {}, si(r.flops)), tip: "of one forward pass of one sample, relative to the dense net; below it the number" },
  { key: "training_flops_ratio", text: "Training FLOPs", better: down, value: (r) => r.training_flops_ratio, cell: (r) => times(r.training_flops_ratio), after: (r) => el("small", {}, si(r.training_flops)), tip: "of the whole training, relative to training the dense net" },
  { key: "parameters", text: "Parameters", better: down, value: (r) => r.parameters, cell: (r) => si(r.parameters), after: (r) => el("small", {}, percent(r.parameters_ratio, 2)), tip: "kept, of all parameters" },
  { key: "bytes", text: "Size", better: down, value: (r) => r.bytes, cell: (r) => si(r.bytes, "B"), after: (r) => el("small", {}, r.storage === "csr" ? "CSR" : r.storage || ""), tip: "of the smallest of the storage formats dense, bit mask and CSR" },
  { key: "seconds", text: "Time", better: down, value: (r) => r.seconds, cell: (r) => duration(r.seconds), after: (r) => (r.cpu_seconds === null ? null : el("small", {}, `CPU ${duration(r.cpu_seconds)}`)), tip: "measured, of a whole run; below it what all cores together spent on it, which does not grow where the machine does other work too" },
  { key: "peak_memory", text: "Peak memory", better: down, value: (r) => r.peak_memory, cell: (r) => si(r.peak_memory, "B"), tip: "measured, of the process" },
];
const EVALUATED = [...new Set(DATA.rows.flatMap((row) => Object.keys(row.evaluations)))]; // what `evaluate` asked for, shares
COLUMNS.splice(3, 0, ...EVALUATED.map((name) => ({ key: name, text: `${name.replaceAll("_", " ")}, %`, better: up, value: (r) => r.evaluations[name] ?? null, cell: (r) => [points(r.evaluations[name])], tip: "mean over seeds, on the test images" })));

// rows whose value is best among the rows of their sparsity, as far as the digits shown tell; none where all are equal
function bestRows(column) {
  const best = new Set();
  if (!column.better) return best;
  for (const level of new Set(DATA.rows.map((row) => row.sparsity_asked))) {
    const rows = DATA.rows.filter((row) => row.sparsity_asked === level && column.value(row) !== null);
    if (level === null || rows.length < 2) continue;
    const sorted = rows.map(column.value).sort((a, b) => (b - a) * column.better);
    const text = (row) => column.cell(row).toString(), leader = rows.find((row) => column.value(row) === sorted[0]);
    const equal = rows.filter((row) => text(row) === text(leader));
    if (equal.length < rows.length) equal.forEach((row) => best.add(row));
  }
  return best;
}

function drawLeaderboard() {
  const { node, tools } = section("leaderboard", "Leaderboard", null);
  const levels = [...new Set(DATA.rows.map((row) => row.sparsity_asked))].filter((level) => level !== null);
  let shown = "all", order = null;
  if (levels.length > 1) tools.append(switcher("Sparsity shown", [{ value: "all", text: "All" }, ...levels.map((level) => ({ value: String(level), text: percent(level) }))], "all", (value) => { shown = value; draw(); }));
  if (DATA.warnings.length) node.append(el("div", { class: "warn", id: "warnings" }, el("h3", {}, "Before you compare"), el("ul", {}, DATA.warnings.map((text) => el("li", {}, text)))));
  const best = new Map(COLUMNS.map((column) => [column.key, bestRows(column)]));
  const heads = COLUMNS.map((column) => el("th", { scope: "col", "data-key": column.key }, el("button", { type: "button", title: column.tip, onclick: () => sort(column) }, column.text)));
  const body = el("tbody", {});
  const table = el("table", { id: "table" }, el("caption", { class: "hidden" }, "Methods at each sparsity; click a column to sort"), el("thead", {}, el("tr", {}, heads)), body);
  if (DATA.rows.length) node.append(el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Leaderboard table" }, table));
  node.append(el("p", { class: "key" }, el("span", { class: "best" }, "best"), "\u2002\u2002at its sparsity, dense left out \u00b7 ", "\u00b1 standard deviation over seeds \u00b7 ",
    "differences in points, paired by seed, with 95 % t-interval; * p < 0.05 after Holm\u2019s correction \u00b7 \u00d7 relative to the dense net \u00b7 FLOPs are counted from the masks; only time and memory are measured"));
  const problems = DATA.runs.filter((run) => run.status !== "finished");
  if (problems.length) node.append(el("div", { class: "fail", id: "problems" }, el("h3", {}, `Not counted (${problems.length})`),
    el("details", { open: problems.length <= FEW }, el("summary", {}, "Which, and why"), el("ul", {}, problems.map((run) => el("li", {}, el("b", {}, run.name), ": ", run.reason || run.status))))));

  function sort(column) {
    const first = column.better === up || column.key === "static" || column.key === "small-dense" ? "descending" : "ascending";
    order = order && order.column === column ? { column, way: order.way === "ascending" ? "descending" : "ascending" } : { column, way: first };
    heads.forEach((head) => { if (head.dataset.key === column.key) head.setAttribute("aria-sort", order.way); else head.removeAttribute("aria-sort"); });
    draw();
  }
  function draw() {
    let rows = DATA.rows.filter((row) => shown === "all" || row.sparsity_asked === null || String(row.sparsity_asked) === shown);
    if (order) {
      const sign = order.way === "ascending" ? 1 : -1, value = order.column.value;
      const missing = (row) => value(row) === null;
      rows = [...rows].sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : sign * (typeof value(a) === "string" ? value(a).localeCompare(value(b)) : value(a) - value(b))));
    }
    body.replaceChildren(...rows.map((row, index) => el("tr", {
      class: !order && index && rows[index - 1].sparsity_asked !== row.sparsity_asked ? "break" : null, "data-label": row.label, "data-sparsity": row.sparsity_asked ?? "dense",
    }, COLUMNS.map((column) => {
      const value = column.value(row), isBest = best.get(column.key).has(row);
      const main = value === null && column.better ? el("span", { class: "no" }, NONE) : column.cell(row);
      return el("td", { "data-key": column.key, "data-value": value, title: column.key === "label" ? row.label : column.cellTip ? column.cellTip(row) : null },
        isBest ? el("span", { class: "best" }, main, el("span", { class: "hidden" }, " (best)")) : main, value !== null && column.after ? column.after(row) : null);
    }))));
  }
  draw();
}
