// The page: what was run, then one section after the other, then the details of each run.
const FACTS = [
  ["Accuracy", (f) => (f.accuracy === null ? null : `${points(f.accuracy)} %`)], ["Loss", (f) => (f.loss === null ? null : tidy(f.loss))], ["Calibration error (ECE)", (f) => (f.ece === null ? null : percent(f.ece, 2))],
  ["Sparsity asked", (f) => (f.sparsity_asked === null ? null : percent(f.sparsity_asked))], ["Sparsity reached", (f) => (f.sparsity === null ? null : percent(f.sparsity, 3))], ["Weights ever kept", (f) => (f.explored === null ? null : percent(f.explored, 2))],
  ["Parameters", (f) => (f.parameters === null ? null : `${whole(f.parameters)} of ${whole(f.parameters_dense)}`)],
  ["FLOPs, one sample", (f) => (f.flops === null ? null : `${si(f.flops)} of ${si(f.flops_dense)}`)], ["FLOPs, training", (f) => (f.training_flops === null ? null : `${si(f.training_flops)} of ${si(f.training_flops_dense)}`)],
  ["Stored dense", (f) => (f.storage_bytes.dense ? si(f.storage_bytes.dense, "B") : null)], ["Stored as bit mask", (f) => (f.storage_bytes.bitmask ? si(f.storage_bytes.bitmask, "B") : null)], ["Stored as CSR", (f) => (f.storage_bytes.csr ? si(f.storage_bytes.csr, "B") : null)],
  ["Length", (f) => [f.epochs === null ? null : `${f.epochs} epochs`, f.steps === null ? null : `${whole(f.steps)} steps`].filter(Boolean).join(", ") || null],
  ["Time", (f) => (f.seconds === null ? null : duration(f.seconds))], ["CPU time", (f) => (f.cpu_seconds === null ? null : duration(f.cpu_seconds))], ["Peak memory", (f) => (f.peak_memory_bytes === null ? null : si(f.peak_memory_bytes, "B"))],
  ["Data", (f) => [f.dataset, f.dataset_note].filter(Boolean).join(": ") || null], ["Network", (f) => f.model],
];
const list = (pairs) => el("dl", {}, pairs.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
function flat(value, prefix = "") {
  if (value === null || typeof value !== "object") return [[prefix, value === null ? NONE : String(value)]];
  if (Array.isArray(value)) return [[prefix, value.map((part) => (part !== null && typeof part === "object" ? JSON.stringify(part) : String(part))).join(", ")]];
  return Object.entries(value).flatMap(([key, part]) => flat(part, prefix ? `${prefix}.${key}` : key));
}

function drawRuns() {
  const { node, tools } = section("runs", "Runs", "Everything recorded about one run: results, full configuration, machine.");
  let run = DATA.runs.find((one) => one.status === "finished") || DATA.runs[0];
  const pick = selector("Run", "details-run", runOptions(DATA.runs), (value) => { run = DATA.runs[Number(value)]; draw(); });
  pick.select.value = String(DATA.runs.indexOf(run));
  tools.append(pick.node);
  const host = el("div", { id: "details" });
  node.append(host);
  function draw() {
    const known = Object.keys(run.facts).length > 0, machine = flat(run.environment);
    host.replaceChildren(
      ...(run.reason ? [el("p", { class: "fail" }, el("b", {}, run.name), ": ", run.reason), el("p", {})] : []),
      el("div", { class: "facts" },
        el("div", {}, el("h3", {}, "Results"), list([["Folder", run.name], ["Status", run.status], ["Seed", run.seed === null ? null : String(run.seed)], ...(known ? FACTS.map(([name, text]) => [name, text(run.facts)]) : []), ...Object.entries(run.facts.evaluations || {}).map(([name, share]) => [name.replaceAll("_", " "), share === null ? null : percent(share, 2)]), ...run.notes.map((note) => ["Note", note])])),
        el("div", {}, el("h3", {}, "Configuration"), run.config ? el("pre", { tabindex: "0" }, run.config) : el("p", { class: "empty" }, "Not recorded.")),
        el("div", {}, el("h3", {}, "Machine"), Object.keys(run.environment).length ? list(machine) : el("p", { class: "empty" }, "Not recorded."))));
  }
  draw();
}

document.title = `${DATA.title} \u2013 rarefy report`;
document.getElementById("title").textContent = DATA.title;
document.getElementById("about").textContent = DATA.about;
document.getElementById("footer").append(`Written by rarefy ${DATA.version} on ${DATA.written}. This file stands alone: it loads nothing from the network.`);
drawLeaderboard();
drawAccuracy();
drawCost();
drawCurves();
{
  const pair = el("div", { class: "pair" });
  document.getElementById("main").append(pair);
  drawLayers(pair);
  drawOverlap(pair);
}
drawFlips();
drawTopology();
drawRuns();
if (DATA.notes.length) document.getElementById("main").append(el("section", { id: "notes" }, el("h2", {}, "Notes"), el("ul", {}, DATA.notes.map((note) => el("li", {}, note)))));
document.documentElement.dataset.ready = "true";
