// How fast masks move: the share of mask bits that flip in a step (SAD from step to step), a line per run.
function drawFlips() {
  const runs = DATA.runs.filter((run) => run.flips);
  if (!runs.length) return;
  const { node, tools } = section("flips", "Mask flips", "Share of the sparse layers\u2019 weights that a step drops or grows, since the point before (SAD, the sparse architecture divergence, over the number of weights). A line that falls is a mask that settles.");
  const levels = [...new Set(runs.map((run) => run.sparsity))].sort((a, b) => a - b);
  const seeds = [...new Set(runs.map((run) => run.seed))].filter((seed) => seed !== null).sort((a, b) => a - b);
  const hidden = new Set();
  let level = String(levels[0]), seed = seeds.length ? String(seeds[0]) : "all";
  if (levels.length > 1) tools.append(selector("Sparsity", "flips-sparsity", levels.map((value) => ({ value: String(value), text: value === null ? "not asked" : percent(value) })), (value) => { level = value; draw(); }).node);
  if (seeds.length > 1) tools.append(selector("Seed", "flips-seed", [...seeds.map((value) => ({ value: String(value), text: String(value) })), { value: "all", text: "all" }], (value) => { seed = value; draw(); }).node);
  const list = legendHost(), host = el("div", { id: "flips-plot" });
  node.append(list, host);
  const labels = DATA.labels.filter((label) => runs.some((run) => run.label === label));
  if (labels.length > 1) legend(list, labels, hidden, () => draw());
  const draw = live(() => {
    const chosen = runs.filter((run) => String(run.sparsity) === level && (seed === "all" || String(run.seed) === seed) && !hidden.has(run.label));
    lineChart(host, chosen.map((run) => ({ name: seed === "all" ? runText(run) : run.label, label: run.label, x: run.flips.steps, y: run.flips.rate, faint: chosen.length > 10 })),
      { yText: (v) => percent(v, 4), yLabel: "mask bits that flip in a step", log: chosen.every((run) => run.flips.rate.every((rate) => rate > 0)), label: "Share of mask bits that flip in a step", marks: true });
  });
}
