// Building blocks: elements (text goes in as text nodes, never as HTML), numbers, scales, the tooltip.
const DATA = JSON.parse(document.getElementById("data").textContent);
const NONE = "\u2013";

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// ---- numbers, written as rarefy's terminal table writes them
function si(value, unit = "") {
  if (value === null || value === undefined) return NONE;
  const prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"];
  let power = 0;
  while (Math.abs(value) >= 999.5 && power < prefixes.length - 1) { value /= 1000; power += 1; }
  const size = Math.abs(value);
  const text = power === 0 ? String(Number(value.toPrecision(3))) : value.toFixed(size < 9.995 ? 2 : size < 99.95 ? 1 : 0);
  return `${text} ${prefixes[power]}${unit}`.trimEnd();
}
const times = (ratio) => (ratio === null || ratio === undefined ? NONE : ratio < 0.9995 ? `${ratio.toFixed(3)}\u00d7` : `${ratio.toFixed(2)}\u00d7`);
const points = (share, signed) => {
  if (share === null || share === undefined) return NONE;
  const text = (100 * share).toFixed(2);
  return signed && !text.startsWith("-") ? `+${text}` : text.replace("-", "\u2212");
};
const percent = (share, digits = 3) => (share === null || share === undefined ? NONE : `${Number((100 * share).toFixed(digits))} %`);
const whole = (value) => (value === null || value === undefined ? NONE : Math.round(value).toLocaleString("en-US"));
function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 120) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(Math.round(seconds) / 60);
  return minutes < 120 ? `${minutes} min ${Math.round(seconds) % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
const tidy = (value) => (Math.abs(value) >= 1e4 ? si(value) : String(Number(value.toPrecision(4))));
const short = (text, length) => (text.length > length ? `${text.slice(0, Math.ceil(length * 0.6))}\u2026${text.slice(-Math.floor(length * 0.4) + 1)}` : text);

// ---- scales and ticks
function scale(from, to, start, end, log) {
  const f = log ? Math.log : (x) => x;
  const width = f(to) - f(from) || 1;
  const map = (x) => start + ((f(x) - f(from)) / width) * (end - start);
  return Object.assign(map, { from, to, start, end });
}
function niceStep(span, count) {
  const raw = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((m) => m * power).find((step) => step >= raw * 0.999);
}
function ticks(from, to, count) {
  if (!(to > from)) return [from];
  const step = niceStep(to - from, count);
  const found = [];
  for (let n = Math.ceil(from / step - 1e-9); n * step <= to + step * 1e-9; n += 1) found.push(Number((n * step).toPrecision(12)));
  return found;
}
function logTicks(from, to, count) {
  const low = Math.floor(Math.log10(from)), high = Math.ceil(Math.log10(to));
  for (const heads of [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const found = [];
    for (let power = low; power <= high; power += 1) for (const head of heads) found.push(Number((head * 10 ** power).toPrecision(6)));
    const inside = found.filter((value) => value >= from * 0.999 && value <= to * 1.001);
    if (inside.length <= count + 2 || heads.length === 1) return inside.length > 1 ? inside : ticks(from, to, count);
  }
  return [];
}
const finite = (values) => values.filter((value) => value !== null && Number.isFinite(value));
const lowest = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const highest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);

// ---- colours and marks: a label has the same colour, mark and dash everywhere on the page
const MARKS = {
  circle: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  square: (r) => `M${-r * 0.9},${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}Z`,
  diamond: (r) => `M0,${-r * 1.25}L${r * 1.25},0L0,${r * 1.25}L${-r * 1.25},0Z`,
  up: (r) => `M0,${-r * 1.2}L${r * 1.15},${r * 0.85}H${-r * 1.15}Z`,
  down: (r) => `M0,${r * 1.2}L${r * 1.15},${-r * 0.85}H${-r * 1.15}Z`,
  cross: (r) => `M${-r * 1.15},${-r * 0.4}H${-r * 0.4}V${-r * 1.15}H${r * 0.4}V${-r * 0.4}H${r * 1.15}V${r * 0.4}H${r * 0.4}V${r * 1.15}H${-r * 0.4}V${r * 0.4}H${-r * 1.15}Z`,
  star: (r) => `M${Array.from({ length: 10 }, (_, n) => { const a = (n * Math.PI) / 5 - Math.PI / 2, d = r * (n % 2 ? 0.62 : 1.35); return `${(d * Math.cos(a)).toFixed(2)},${(d * Math.sin(a)).toFixed(2)}`; }).join("L")}Z`,
};
const SHAPES = Object.keys(MARKS);
const DENSE = new Set(DATA.runs.filter((run) => run.facts.method === "dense").map((run) => run.label));
const METHODS = DATA.labels.filter((label) => !DENSE.has(label));
// the usual eight keep their colours whichever of them were run
const USUAL = ["dense", "small-dense", "static", "snip", "magnitude", "gradual", "set", "rigl"];
const STYLES = (() => {
  const styles = new Map();
  const free = [1, 2, 3, 4, 5, 6, 7].filter((n) => !METHODS.includes(USUAL[n]));
  let extra = 0;
  for (const label of DATA.labels) {
    const usual = USUAL.indexOf(label);
    if (DENSE.has(label)) styles.set(label, { colour: 0, shape: SHAPES[0], dash: "7 4" });
    else if (usual > 0) styles.set(label, { colour: usual, shape: SHAPES[(usual + 6) % 7], dash: null });
    else {
      const colour = extra < free.length ? free[extra] : 1 + (extra % 7);
      styles.set(label, { colour, shape: SHAPES[(colour + 6 + (extra < free.length ? 0 : 1 + Math.floor(extra / 7))) % 7], dash: extra < free.length ? null : "2 4" });
      extra += 1;
    }
  }
  return styles;
})();
const styleOf = (label) => STYLES.get(label) || { colour: 0, shape: "circle", dash: null };
function swatch(label) {
  const style = styleOf(label);
  return svg("svg", { class: `swatch c${style.colour}`, viewBox: "0 0 22 12", "aria-hidden": "true" },
    svg("line", { class: "trace", x1: 0, x2: 22, y1: 6, y2: 6, "stroke-dasharray": style.dash }),
    DENSE.has(label) ? null : svg("path", { class: "mark", d: MARKS[style.shape](4.6), transform: "translate(11 6)" }));
}

// ---- tooltip: a title and rows of [name, value] pairs
const tip = document.getElementById("tip");
function showTip(event, title, rows) {
  tip.replaceChildren(el("b", {}, title), ...rows.map(([name, value, dim]) => el("div", { class: dim ? "dim" : null }, el("span", {}, name), el("span", {}, value || ""))));
  tip.hidden = false;
  const box = event.target.getBoundingClientRect();
  const x = event.clientX ?? box.left + box.width / 2, y = event.clientY ?? box.top;
  const left = x + 16 + tip.offsetWidth > window.innerWidth ? x - 16 - tip.offsetWidth : x + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, window.innerHeight - tip.offsetHeight - 6))}px`;
}
const hideTip = () => { tip.hidden = true; };
function withTip(node, title, rows) {
  for (const kind of ["mousemove", "focus"]) node.addEventListener(kind, (event) => showTip(event, title, rows));
  for (const kind of ["mouseleave", "blur"]) node.addEventListener(kind, hideTip);
  return node;
}
window.addEventListener("scroll", hideTip, { passive: true });
window.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
