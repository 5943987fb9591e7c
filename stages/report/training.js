// The page of training runs: their curves together, and a table of how they went.

const SHADES = 6;
let page;

function kind(run) {
  return `k${run % SHADES}`;
}

function isDashed(run) {
  return run >= SHADES;
}

function draw() {
  const hidden = new Set();
  const plots = element("div", { class: "plots wide", id: "plots" });
  const show = () => plots.replaceChildren(...page.charts.map((chart) => curves(chart, hidden)));
  const toggles = page.runs.map((run, place) => {
    const button = element("button", { type: "button", "aria-pressed": "true", title: run.path, onclick: () => {
      if (!hidden.delete(place)) hidden.add(place);
      button.setAttribute("aria-pressed", String(!hidden.has(place)));
      show();
    } }, swatch(kind(place), isDashed(place)), run.name);
    return element("li", {}, button);
  });
  byId("crumb").textContent = page.runs.map((run) => run.path).join("  ·  ");
  const unfinished = page.runs.filter((run) => !run.finished).map((run) => run.name);
  byId("main").append(
    element("p", { class: "lead" }, page.runs.length === 1 ? "One training run" : `${page.runs.length} training runs`),
    ...(unfinished.length ? [element("p", { class: "note" }, `Not finished: ${unfinished.join(", ")}.`)] : []),
    element("ul", { class: "keys", "aria-label": "Runs" }, ...toggles),
    element("h2", {}, "Curves"),
    plots,
    element("h2", {}, "How they went"),
    table(),
    element("footer", {}, "Made by qpipe. Thin lines are single steps, strong ones their running mean; dots are evaluations."),
  );
  show();
}

function curves(chart, hidden) {
  const isMixed = new Set(chart.curves.map((curve) => curve.noisy)).size > 1;
  const series = chart.curves.filter((curve) => !hidden.has(curve.run)).flatMap((curve) => {
    const name = page.runs[curve.run].name + (isMixed && !curve.noisy ? ", held out" : "");
    const about = { name, kind: kind(curve.run), dashed: isDashed(curve.run) };
    if (!curve.noisy) return [{ ...about, points: curve.points, dots: curve.points.length <= 60, dashed: isMixed }];
    return [{ ...about, points: curve.points, thin: true }, { ...about, points: curve.course }];
  });
  const made = lines(chart.title, chart.unit, series, { box: wide(520, 230), xName: (step) => `step ${count(step)}` });
  if (isMixed) made.append(element("ul", { class: "keys small" }, key("k5", "training"), key("k5", "held out", true)));
  return made;
}

function table() {
  const fields = [...new Set(page.runs.flatMap((run) => Object.keys(run.last)))];
  const settings = [...new Set(page.runs.flatMap((run) => Object.keys(run.settings)))];
  const words = (name) => name.replaceAll("_", " ");
  const head = ["run", ...settings.map(words), "steps", "supervised tokens", "tokens/s", ...fields.map((name) => `last ${words(name)}`)];
  const rows = page.runs.map((run, place) => [
    ...settings.map((name) => run.settings[name] ?? "–"),
    count(run.steps), count(run.tokens), number(run.tokens_per_second),
    ...fields.map((name) => number(run.last[name], 4)),
  ].reduce((row, cell) => { row.append(element("td", {}, cell)); return row; },
    element("tr", {}, element("td", {}, drawn("svg", { class: "dot", viewBox: "0 0 10 10" }, drawn("circle", { class: kind(place), cx: 5, cy: 5, r: 4 })), run.name))));
  return element("div", { class: "table" }, element("table", {},
    element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows)));
}

async function start() {
  startTheme();
  page = await readJson("head");
  draw();
  document.documentElement.dataset.ready = "yes";
}

start().catch(failed);
