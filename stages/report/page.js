"use strict";
// What the pages share: elements, data, the theme, charts. Text of the data only ever becomes a
// text node.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  return filled(made, attributes, children);
}

function drawn(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, String(value));
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

async function inflated(id) {
  const text = atob(byId(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function readJson(id) {
  return JSON.parse(new TextDecoder().decode(await inflated(id)));
}

// Numbers

function count(value) {
  return Math.round(value).toLocaleString("en-US");
}

function plural(value, noun) {
  return value === 1 ? noun : `${noun}s`;
}

function number(value, digits = 3) {
  if (value == null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1).replace("e+", "e");
  if (size >= 1000) return count(value);
  return String(Number(value.toPrecision(digits)));
}

function percent(share) {
  if (share >= 0.9995) return "100%";
  if (share >= 0.1) return `${(100 * share).toFixed(1)}%`;
  return share >= 0.0005 ? `${(100 * share).toFixed(share < 0.01 ? 2 : 1)}%` : "0%";
}

// The theme

function startTheme() {
  const root = document.documentElement;
  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const turn = () => { root.dataset.theme = isDark() ? "light" : "dark"; };
  byId("theme").addEventListener("click", turn);
  document.addEventListener("keydown", (event) => {
    if (event.key === "t" && !isTyping(event)) turn();
  });
}

function isTyping(event) {
  return event.ctrlKey || event.metaKey || event.altKey
    || ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)
    && event.target.type !== "radio";
}

// Charts

const BOX = { width: 340, height: 150, left: 34, right: 6, top: 6, bottom: 22 };
const isPhone = matchMedia("(max-width: 640px)");
const WIDE = { left: 44, right: 10, top: 8, bottom: 26 };

function steps(low, high, wanted) {
  const raw = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

function frame(box, low, high, format) {
  const y = (value) => box.height - box.bottom
    - (value - low) / (high - low || 1) * (box.height - box.top - box.bottom);
  const svg = drawn("svg", { viewBox: `0 0 ${box.width} ${box.height}` });
  for (const value of steps(low, high, 4)) {
    svg.append(
      drawn("line", { class: "rule", x1: box.left, x2: box.width - box.right, y1: y(value), y2: y(value) }),
      drawn("text", { x: box.left - 7, y: y(value) + 4, "text-anchor": "end" }, format(value)),
    );
  }
  return { svg, y };
}

function figure(title, note, svg, ...rest) {
  const side = element("small", { "aria-live": "polite" }, note);
  const made = element("figure", { class: "plot" },
    element("figcaption", {}, element("span", {}, title), side), svg, ...rest);
  made.say = (text) => { side.textContent = text ?? note; };
  return made;
}

// Bars: `names[i]` says what bin i holds, `ticks` are [place among the bins, label].
function histogram(title, note, bins, names, ticks) {
  const box = BOX;
  const total = bins.reduce((sum, each) => sum + each, 0) || 1;
  const high = Math.max(...bins) / total;
  const { svg, y } = frame(box, 0, high, (share) => `${Math.round(100 * share)}%`);
  svg.setAttribute("role", "group");
  svg.setAttribute("aria-label", `${title}: ${note}`);
  const width = (box.width - box.left - box.right) / bins.length;
  const made = figure(title, note, svg);
  bins.forEach((each, i) => {
    const said = `${names[i]}: ${percent(each / total)}`;
    const top = each ? Math.min(y(each / total), y(0) - 1.5) : y(0);
    const x = box.left + i * width;
    svg.append(drawn("g", {
      role: "img", "aria-label": said,
      onpointerenter: () => made.say(said), onpointerleave: () => made.say(),
    },
      drawn("rect", { class: "bar", x: x + 0.8, width: Math.max(width - 1.6, 1), y: top, height: y(0) - top, rx: 1.5 }),
      drawn("rect", { class: "hit", x, width, y: box.top, height: y(0) - box.top }),
    ));
  });
  svg.append(drawn("line", { class: "axis", x1: box.left, x2: box.width - box.right, y1: y(0), y2: y(0) }));
  for (const [place, label] of ticks) {
    const anchor = place === 0 ? "start" : place === bins.length ? "end" : "middle";
    svg.append(drawn("text", { x: box.left + place * width, y: box.height - 6, "text-anchor": anchor }, label));
  }
  return made;
}

function wide(width, height) {
  return isPhone.matches ? { ...BOX, height: 190 } : { ...WIDE, width, height };
}

// Lines: series are {name, kind, points: [[x, y]], thin, dashed, dots}; `across` maps x to 0…1.
function lines(title, note, series, { box = BOX, across, ticks, xName = number, zero = true } = {}) {
  const shown = series.filter((each) => each.points.length);
  const ys = shown.flatMap((each) => each.points.map((point) => point[1]));
  const xs = shown.flatMap((each) => each.points.map((point) => point[0]));
  let [low, high] = range(shown, zero);
  const { svg, y } = frame(box, low, high, (value) => number(value));
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${title}: ${shown.map((each) => `${each.name} ends at ${number(each.points.at(-1)[1])}`).join(", ")}`);
  const [left, right] = ends(xs);
  const place = across ?? ((value) => (value - left) / (right - left || 1));
  const x = (value) => box.left + place(value) * (box.width - box.left - box.right);
  for (const each of shown) {
    const inside = each.points.map(([a, b]) => [x(a), y(Math.min(Math.max(b, low), high))]);
    const path = inside.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
    svg.append(drawn("path", { class: `${each.kind}${each.thin ? " thin" : ""}${each.dashed ? " dashed" : ""}`, d: path, "data-run": each.run }));
    if (each.dots) for (const [a, b] of inside) svg.append(drawn("circle", { class: each.kind, cx: a, cy: b, r: 3.6 }));
  }
  svg.append(drawn("line", { class: "axis", x1: box.left, x2: box.width - box.right, y1: box.height - box.bottom, y2: box.height - box.bottom }));
  for (const [value, label] of ticks ?? steps(left, right, 5).map((value) => [value, number(value)])) {
    const share = place(value);
    svg.append(drawn("text", { x: x(value), y: box.height - 7, "text-anchor": share < 0.04 ? "start" : share > 0.96 ? "end" : "middle" }, label));
  }
  const made = figure(title, note, svg);
  follow(svg, box, shown, x, (value, found) => made.say(value == null ? null
    : `${xName(value)}: ${found.map(([each, point]) => `${each.name} ${number(point[1])}`).join(" · ")}`));
  return made;
}

// The least and the greatest; spread out as arguments, the values of many runs would be too many.
function ends(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

// A few wild steps at the start must not flatten the rest: thin curves count by their middle 98%.
function range(series, zero) {
  const values = series.flatMap((each) => {
    const own = each.points.map((point) => point[1]).sort((a, b) => a - b);
    const cut = each.thin ? Math.floor(own.length * 0.01) : 0;
    return own.slice(cut, own.length - cut);
  });
  if (!values.length) return [0, 1];
  let [low, high] = ends(values);
  if (Math.abs(low) < 0.02 * high || (zero && low > 0 && (low < 0.6 * high || high - low < 1e-9))) low = 0;
  const room = (high - low || 1) * 0.05;
  return [low === 0 ? 0 : low - room, high + room];
}

// A line under the pointer, and what every curve is there.
function follow(svg, box, series, x, say) {
  const cross = drawn("line", { class: "cross", y1: box.top, y2: box.height - box.bottom, visibility: "hidden" });
  svg.append(cross);
  svg.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect();
    const at = (event.clientX - area.left) / area.width * box.width;
    const found = series.map((each) => [each, each.points.reduce((best, point) =>
      Math.abs(x(point[0]) - at) < Math.abs(x(best[0]) - at) ? point : best)]);
    if (!found.length) return;
    const nearest = found.reduce((best, each) =>
      Math.abs(x(each[1][0]) - at) < Math.abs(x(best[1][0]) - at) ? each : best)[1][0];
    for (const name of ["x1", "x2"]) cross.setAttribute(name, x(nearest));
    cross.setAttribute("visibility", "visible");
    say(nearest, found.filter(([, point]) => Math.abs(x(point[0]) - x(nearest)) < 6));
  });
  svg.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    say(null, []);
  });
}

function key(kind, name, dashed) {
  return element("li", {}, swatch(kind, dashed), name);
}

function swatch(kind, dashed) {
  return drawn("svg", { viewBox: "0 0 18 8", "aria-hidden": "true" },
    drawn("path", { class: kind, d: "M1 4H17", "stroke-width": 2.4, "stroke-dasharray": dashed ? "4 3" : null }));
}

function tiles(pairs) {
  return element("div", { class: "tiles" }, ...pairs.map(([value, name]) =>
    element("div", { class: "tile" }, element("b", {}, value), element("span", {}, name))));
}

function failed(error) {
  console.error(error);
  byId("main").append(element("p", { class: "note", role: "alert" }, `This page cannot be drawn: ${error.message}`));
}
