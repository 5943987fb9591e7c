// The page of a folder of targets or scores: its summary, and its demonstrations, drawn as they come
// near the screen.

const ROLE_NAMES = { target: "target", base: "base", teacher: "teacher" };
const PER_UNIT = { "log-prob": 1000, share: 1000, nats: 100, rank: 1 };
const NEAR = "1400px"; // how far from the screen a demonstration is drawn
const GROUP = 32; // demonstrations that are watched as one while they are far
const SLICE = 5; // milliseconds of drawing in a frame
const HELD_CHUNKS = 48;
const LONG_PROMPT = 900, HEAD_SHOWN = 320, TAIL_SHOWN = 260; // characters

let page, vocabulary, order, colourBy, query = "";
const chunks = new Map();
const texts = new Map();
const cards = [];

// What the numbers mean

function ink(scale, value) {
  const inside = (share) => Math.min(Math.max(share, 0), 1);
  if (scale === "share") return inside(1 - value);
  if (scale === "nats") return inside(value / 4);
  if (scale === "rank") return inside(Math.log10(Math.max(value, 1)) / 3);
  return Math.min(Math.max(value, -1), 1);
}

function inkClass(scale, value) {
  const strength = ink(scale, value);
  return scale === "difference" ? `d${Math.round(4 * strength) + 4}` : `c${Math.round(9 * strength)}`;
}

function valueOf(look, name, place) {
  if (name === "gain") return valueOf(look, "target", place) - valueOf(look, "base", place);
  const kind = page.kinds.get(name);
  const raw = look.columns.get(name)[place] / PER_UNIT[kind];
  return kind === "log-prob" ? Math.exp(-raw) : raw;
}

// Unpacking

function columnReader(bytes) {
  const view = new DataView(bytes.buffer);
  let at = 0;
  return (size) => {
    const length = view.getUint32(at, true);
    const start = at + 4;
    at = start + length * size;
    if (size === 1) return bytes.subarray(start, at);
    const made = size === 2 ? new Uint16Array(length) : new Uint32Array(length);
    for (let plane = 0; plane < size; plane++) {
      for (let i = 0; i < length; i++) made[i] |= bytes[start + plane * length + i] << (8 * plane);
    }
    return made;
  };
}

async function unpacked(chunk) {
  const next = columnReader(await inflated(`chunk-${chunk}`));
  const tokens = next(4), mask = next(1);
  const columns = page.columns.map(([name]) => [name, next(2)]);
  const counts = next(1), ids = next(4);
  const probs = page.roles.map((role) => [role, next(1)]);
  const first = chunk * page.chunk;
  const looks = [];
  let t = 0, n = 0, r = 0;
  for (let i = first; i < Math.min(first + page.chunk, page.examples.ids.length); i++) {
    const [T, N] = [page.examples.tokens[i], page.examples.supervised[i]];
    const own = counts.subarray(n, n + N);
    const starts = new Uint32Array(N);
    let R = 0;
    own.forEach((each, place) => { starts[place] = R; R += each; });
    looks.push({
      tokens: tokens.subarray(t, t + T),
      mask: mask.subarray(t, t + T),
      columns: new Map(columns.map(([name, values]) => [name, values.subarray(n, n + N)])),
      counts: own,
      starts,
      others: ids.subarray(r, r + R),
      probs: new Map(probs.map(([role, values]) => [role, values.subarray(r, r + R)])),
    });
    [t, n, r] = [t + T, n + N, r + R];
  }
  return looks;
}

async function look(index) {
  const chunk = Math.floor(index / page.chunk);
  if (!chunks.has(chunk)) {
    if (chunks.size >= HELD_CHUNKS) chunks.delete(chunks.keys().next().value);
    chunks.set(chunk, unpacked(chunk));
  }
  return (await chunks.get(chunk))[index % page.chunk];
}

async function textOf(index) {
  if (!texts.has(index)) {
    const found = await look(index);
    texts.set(index, Array.from(found.tokens, (each) => vocabulary.texts[each]).join(""));
  }
  return texts.get(index);
}

// The summary

function summary() {
  const { folder, summary: { measures } } = page;
  const settings = folder.settings;
  const words = folder.stage === "score" ? "Scores" : "Targets";
  const made = settings.method
    ? `${settings.method} (${settings.form}${Object.entries(settings.parameters).map(([name, value]) => `, ${name}=${value}`).join("")})`
    : `top ${settings.top_k}`;
  byId("crumb").textContent = folder.path;
  const main = byId("main");
  main.append(
    element("p", { class: "lead" }, `${words}: `, element("code", {}, made), folder.model ? ` of ${folder.model}` : ""),
    ...page.notes.map((note) => element("p", { class: "note" }, note)),
    tiles([
      [count(folder.examples), plural(folder.examples, "demonstration")],
      [count(folder.supervised_tokens), plural(folder.supervised_tokens, "supervised token")],
      ...(measures.trust ? [[number(measures.trust.mean), "mean trust γ"]] : []),
      [number(Math.exp(-(measures["base-nll"] ?? measures.nll).mean)), measures.target && !measures.base ? "geometric mean of Q(y)" : "geometric mean of b(y)"],
      [number(folder.mean_support), "mean support, entries"],
      [folder.kept_mass == null ? "–" : `${(100 * folder.kept_mass).toFixed(2)}%`, "kept mass"],
      [number(folder.bytes_per_token), "bytes a token"],
    ]),
    element("h2", {}, "Over all supervised tokens"),
    element("div", { class: "plots" }, ...plots()),
  );
}

function plots() {
  const { measures, by_position: places } = page.summary;
  const wanted = ["trust", "weight", "target", "base", "teacher", "gain", "base-entropy", "entropy", "base-rank", "rank", "kl", "support", "kept"];
  const dull = new Set(page.constant.filter((name) => name === "weight"));
  if (measures["base-rank"]) dull.add("rank");
  const made = wanted.filter((name) => measures[name] && !dull.has(name)).map((name) => spread(measures[name]));
  const series = [["nll", page.folder.stage === "score" ? "base" : "own", page.folder.stage === "score" ? "−log b(y)" : "−log Q(y)"], ["base-nll", "base", "−log b(y)"]]
    .filter(([name]) => places[name])
    .map(([name, kind, said]) => ({ name: said, kind: `k-${kind}`, dots: true, points: places.starts.map((start, i) => [start, places[name][i]]) }));
  const last = places.starts.length - 1;
  const columns = 3 - made.length % 3; // what the last row has room for
  const chart = lines("Loss by position", "nats, by place in the answer", series, {
    box: [BOX, wide(714, 170), wide(1088, 190)][columns - 1],
    across: (value) => places.starts.indexOf(value) / (last || 1),
    ticks: places.starts.map((start) => [start, start]).filter((_, i) => last < 8 || i % 2 === 0).map(([start]) => [start, count(start + 1)]),
    xName: (value) => spanName(places.starts, value),
  });
  chart.classList.add(`over-${columns}`);
  if (series.length > 1) chart.append(element("ul", { class: "keys small" }, ...series.map((each) => key(each.kind, each.name))));
  return [...made, chart];
}

function spanName(starts, value) {
  const next = starts[starts.indexOf(value) + 1];
  return next === value + 1 ? `token ${value + 1}` : next ? `tokens ${value + 1}–${next}` : `from token ${value + 1}`;
}

function spread(each) {
  const { edges, labels } = each;
  const size = edges.length - 1;
  const names = labels.length ? labels : edges.slice(0, -1).map((edge, i) =>
    each.open && i === size - 1 ? `${number(edge)} or more` : `${number(edge)} to ${number(edges[i + 1])}`);
  const kept = trimmed(each);
  const bins = each.histogram.slice(0, kept);
  const shown = names.slice(0, kept);
  const ticks = labels.length
    ? shown.map((label, i) => [i + 0.5, label]).filter((_, i) => shown.length < 7 || i % 2 === (shown.length + 1) % 2)
    : [0, 0.25, 0.5, 0.75, 1].map((share) => share * kept).filter((place) => Number.isInteger(place))
      .map((place) => [place, number(edges[place]) + (each.open && place === size ? "+" : "")]);
  const shortened = ticks.map(([place, label]) => [place, String(label).replace(/^([\d.]+)–.*$/, each.scale === "share" ? "≥ $1" : "$&")]);
  return histogram(each.title, `mean ${number(each.mean)}`, bins, shown, shortened);
}

// An open scale ends where there is nothing any more, at a multiple of a unit.
function trimmed(each) {
  const size = each.histogram.length;
  if (each.labels.length || !each.open) return size;
  const last = each.histogram.reduce((found, bin, i) => (bin ? i : found), 0);
  return Math.min(size, Math.max(8, Math.ceil((last + 1) / 4) * 4));
}

// The demonstrations

function demonstrations() {
  const names = page.colours;
  colourBy = startingColour();
  const inputs = names.map((name) => element("label", { title: page.measures[name].words },
    element("input", { type: "radio", name: "colour", value: name, checked: name === colourBy, onchange: () => setColour(name) }),
    element("span", {}, page.measures[name].title)));
  const search = element("input", { class: "field", id: "search", type: "search", placeholder: "Search ids and text  ( / )", "aria-label": "Search ids and text", oninput: soon(find) });
  const sort = element("select", { class: "field", id: "sort", "aria-label": "Sort by", onchange: arrange },
    element("option", { value: "" }, "In the folder's order"),
    ...Object.keys(page.measures).flatMap((name) => ["highest", "lowest"].map((end) =>
      element("option", { value: `${end}-${name}` }, `${page.measures[name].title}, ${end} mean`))),
    element("option", { value: "highest-tokens" }, "Longest"));
  byId("main").append(
    element("h2", { id: "demos" }, "Demonstrations"),
    element("div", { class: "bar-top", id: "tools" },
      element("div", { class: "row" },
        element("div", { class: "switch", role: "radiogroup", "aria-label": "Colour tokens by" }, ...inputs),
        element("div", { class: "legend", id: "legend" })),
      element("div", { class: "row" }, search, sort, element("span", { class: "count", id: "count", role: "status" }))),
    element("div", { id: "list" }),
    element("footer", {},
      element("span", { class: "desk" }, "Keys: ", element("kbd", {}, "/"), " search, ", element("kbd", {}, "1"), "…", element("kbd", {}, String(Math.min(names.length, 9))), " colour, ", element("kbd", {}, "j"), " ", element("kbd", {}, "k"), " demonstration, ", element("kbd", {}, "←"), " ", element("kbd", {}, "→"), " token, ", element("kbd", {}, "t"), " light or dark. "),
      `Made by qpipe, fingerprint ${page.folder.fingerprint.slice(0, 12)}. Alternatives below 0.2% are left out; numbers are rounded.`),
  );
  legend();
  arrange();
}

function startingColour() {
  const varied = page.colours.filter((name) => !page.constant.includes(name));
  return ["trust", "weight", "base", "target"].find((name) => varied.includes(name)) ?? page.colours[0];
}

function legend() {
  const { scale, words } = page.measures[colourBy];
  const ends = { share: ["1", "0"], nats: ["0", "≥ 4 nats"], rank: ["1st", "≥ 1,000th"], difference: ["−1", "+1"] }[scale];
  const classes = scale === "difference" ? Array.from({ length: 9 }, (_, i) => `j${i}`) : Array.from({ length: 10 }, (_, i) => `i${i}`);
  byId("legend").replaceChildren(
    element("span", {}, ends[0]),
    element("span", { class: "ramp", role: "img", "aria-label": `from ${ends[0]} to ${ends[1]}` }, ...classes.map((name) => element("i", { class: name }))),
    element("span", {}, ends[1]),
    element("span", { class: "words" }, `· ${words}`));
}

function setColour(name) {
  colourBy = name;
  legend();
  for (const card of cards) if (card.look) paint(card);
}

function soon(act) {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(act, 160); };
}

let searches = 0;
async function find() {
  const mine = ++searches;
  query = byId("search").value.trim().toLowerCase();
  if (query) {
    byId("count").textContent = "searching …";
    for (let i = 0; i < page.examples.ids.length; i++) {
      await textOf(i);
      if (mine !== searches) return;
    }
  }
  arrange();
}

function arrange() {
  globalThis.CSS?.highlights?.delete("found");
  const { ids, means, tokens } = page.examples;
  const [end, ...rest] = byId("sort").value.split("-");
  const by = rest.join("-");
  order = ids.map((_, i) => i).filter((i) => !query
    || ids[i].toLowerCase().includes(query) || texts.get(i)?.toLowerCase().includes(query));
  if (by) {
    const values = by === "tokens" ? tokens : means[by];
    const sign = end === "highest" ? -1 : 1;
    order.sort((a, b) => sign * (values[a] - values[b]));
  }
  list(by === "tokens" ? "" : by);
}

// Thousands of demonstrations are too many to watch one by one: groups of them are, and those of the
// groups at hand.
let groupWatcher, watcher;
function list(sortedBy) {
  groupWatcher?.disconnect();
  watcher?.disconnect();
  waiting.clear();
  hidePop();
  cards.length = 0;
  const width = byId("list").clientWidth || 900;
  const margin = { rootMargin: `${NEAR} 0px` };
  watcher = new IntersectionObserver(drawNear, margin);
  groupWatcher = new IntersectionObserver(watchNear, margin);
  const groups = [];
  for (const index of order) {
    if (cards.length % GROUP === 0) groups.push(element("div", { class: "group" }));
    const node = element("article", { class: "demo", "data-place": cards.length });
    node.style.minHeight = guess(index, width);
    cards.push({ index, node, sortedBy });
    groups.at(-1).append(node);
  }
  byId("list").replaceChildren(...groups);
  for (const group of groups) groupWatcher.observe(group);
  if (!cards.length) byId("list").append(element("p", { class: "empty" }, page.examples.ids.length ? `No demonstration has “${query}” in its id or its text.` : "This folder holds no demonstrations."));
  const all = page.examples.ids.length;
  byId("count").textContent = order.length === all ? `${count(all)} ${plural(all, "demonstration")}` : `${count(order.length)} of ${count(all)}`;
}

// How high a demonstration will be, so that the page keeps its length as it is drawn.
function guess(index, width) {
  const { tokens, supervised } = page.examples;
  const characters = 3.4 * supervised[index] + Math.min(3.4 * (tokens[index] - supervised[index]), LONG_PROMPT);
  return `${74 + 26 * Math.ceil(characters / Math.max(width / 8.5, 20))}px`;
}

// What is left to be told of demonstrations comes first: none is told of those of a group that left.
function watchNear(changes) {
  drawNear(watcher.takeRecords());
  for (const { target: group, isIntersecting } of changes) {
    for (const node of group.children) {
      if (isIntersecting) watcher.observe(node);
      else watcher.unobserve(node);
    }
  }
}

const waiting = new Set();
function drawNear(changes) {
  for (const { target, isIntersecting, boundingClientRect: box } of changes) {
    const card = cards[target.dataset.place];
    if (card?.node !== target) continue;
    card.isNear = isIntersecting;
    card.middle = box.top + box.height / 2 + scrollY;
    if (!isIntersecting) waiting.delete(card);
    if (isIntersecting && !card.look) waiting.add(card);
    else if (!isIntersecting && card.look) erase(card, box.height);
  }
  if (waiting.size) drawWaiting();
}

// A few a frame, those first that are nearest to what is seen.
let isDrawing = false;
async function drawWaiting() {
  if (isDrawing) return;
  isDrawing = true;
  while (waiting.size) {
    await new Promise(requestAnimationFrame);
    const [end, middle] = [performance.now() + SLICE, scrollY + innerHeight / 2];
    const away = (card) => Math.abs(card.middle - middle);
    for (const card of [...waiting].sort((a, b) => away(a) - away(b))) {
      if (waiting.delete(card)) await draw(card);
      if (performance.now() > end) break;
    }
  }
  isDrawing = false;
}

async function draw(card) {
  const found = await look(card.index);
  if (!card.isNear || card.look) return;
  card.look = found;
  const { ids, supervised, means, tokens } = page.examples;
  const i = card.index;
  const facts = [`${count(supervised[i])} of ${count(tokens[i])} tokens`];
  for (const name of new Set([card.sortedBy, colourBy, "nll", "kl"])) {
    if (name && means[name]) facts.push(`${page.measures[name].title} ${number(means[name][i])}`);
  }
  card.body = element("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": `Demonstration ${ids[i]}: arrow keys go through its tokens` });
  card.tokens = [];
  let plain = "";
  const flush = () => { card.body.append(...prompt(plain)); plain = ""; };
  found.tokens.forEach((token, place) => {
    const text = vocabulary.texts[token];
    if (!found.mask[place]) { plain += text; return; }
    flush();
    const node = element("u", {}, text);
    node.place = card.tokens.length;
    node.token = token;
    node.mark = text.includes("\n") ? " nl" : text === "" ? " go" : "";
    card.tokens.push(node);
    card.body.append(node);
  });
  flush();
  paint(card);
  card.node.replaceChildren(
    element("header", {}, element("h3", {}, ids[i]), ...facts.map((fact) => element("span", {}, fact))), card.body);
  card.body.card = card;
  card.node.style.minHeight = "";
  mark(card);
}

// Text that is not supervised; of a long one the beginning and the end, until asked for.
function prompt(text) {
  const span = element("span", {}, text);
  if (text.length <= LONG_PROMPT) return text ? [span] : [];
  const hidden = text.slice(HEAD_SHOWN, text.length - TAIL_SHOWN);
  const more = element("button", { type: "button", onclick: () => more.replaceWith(hidden) }, `${count(hidden.length)} more characters`);
  span.replaceChildren(text.slice(0, HEAD_SHOWN), more, text.slice(text.length - TAIL_SHOWN));
  return [span];
}

function erase(card, height) {
  if (card.body.contains(document.activeElement)) return;
  card.node.style.minHeight = `${height}px`;
  card.node.replaceChildren();
  card.look = card.body = card.tokens = undefined;
}

function paint(card) {
  const { scale } = page.measures[colourBy];
  for (const node of card.tokens) {
    node.className = inkClass(scale, valueOf(card.look, colourBy, node.place)) + node.mark;
  }
}

// What was searched for is underlaid, where the browser can do that across elements.
function mark(card) {
  if (!query || !globalThis.Highlight || !CSS.highlights) return;
  const nodes = [];
  const walker = document.createTreeWalker(card.body, NodeFilter.SHOW_TEXT);
  let text = "";
  while (walker.nextNode()) {
    nodes.push([text.length, walker.currentNode]);
    text += walker.currentNode.data;
  }
  const highlight = CSS.highlights.get("found") ?? new Highlight();
  CSS.highlights.set("found", highlight);
  const lower = text.toLowerCase();
  if (lower.length !== text.length) return;
  const spot = (offset) => {
    const [start, node] = nodes.findLast(([from]) => from <= offset);
    return [node, offset - start];
  };
  for (let at = lower.indexOf(query); at >= 0; at = lower.indexOf(query, at + query.length)) {
    const range = document.createRange();
    range.setStart(...spot(at));
    const [node, offset] = spot(at + query.length - 1);
    range.setEnd(node, offset + 1);
    highlight.add(range);
  }
}

// What is known of one token

const pop = element("aside", { class: "pop", id: "pop", role: "tooltip", hidden: true });
let active;

// `mayScroll` where the pointer does not hover: a page that moves under it would go on and on.
function showPop(node, mayScroll = false) {
  const card = node.parentNode.card;
  if (!card?.look) return;
  active?.classList.remove("on");
  active = node;
  node.classList.add("on");
  node.setAttribute("aria-describedby", "pop");
  pop.replaceChildren(...about(card.look, node));
  pop.hidden = false;
  const at = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const [width, height] = [pop.offsetWidth, pop.offsetHeight];
  if (isPhone.matches) { // a sheet at the bottom: the token must stay in sight above it
    const covered = at.bottom + 16 - (innerHeight - height);
    if (covered > 0 && mayScroll) scrollBy({ top: covered });
    return;
  }
  pop.style.left = `${Math.max(12, Math.min(at.left - 20, innerWidth - width - 12))}px`;
  const below = at.bottom + 10;
  pop.style.top = `${below + height > innerHeight - 8 && at.top - height - 10 > 8 ? at.top - height - 10 : below}px`;
}

function hidePop() {
  active?.classList.remove("on");
  active?.removeAttribute("aria-describedby");
  active = undefined;
  pop.hidden = true;
}

function visible(text) {
  if (text === "") return "‥";
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

function about(found, node) {
  const place = node.place;
  const facts = page.colours.map((name) => {
    const value = valueOf(found, name, place);
    const shown = page.measures[name].scale === "rank" ? count(value) : number(value);
    return element("div", {}, element("dt", {}, page.measures[name].title), element("dd", {}, shown));
  });
  const rows = Array.from({ length: found.counts[place] }, (_, i) => found.starts[place] + i);
  const share = (role, row) => isSame(found.others[row], node.token)
    ? valueOf(found, role, place) // to three digits, the alternatives to two
    : (found.probs.get(role)[row] / 255) ** 2;
  const left = page.roles.map((role) => [role, 1 - rows.reduce((sum, row) => sum + share(role, row), 0)]);
  return [
    element("h4", {}, visible(vocabulary.texts[node.token]), element("small", {}, `id ${vocabulary.ids[node.token]}`)),
    element("dl", {}, ...facts),
    element("table", {},
      element("thead", {}, element("tr", {}, element("th", {}, "token"), ...page.roles.map((role) => element("th", {}, ROLE_NAMES[role])))),
      element("tbody", {}, ...rows.map((row) => element("tr", { class: isSame(found.others[row], node.token) ? "seen" : null },
        element("td", {}, visible(vocabulary.texts[found.others[row]])),
        ...page.roles.map((role) => element("td", {}, meter(role, share(role, row)))))))),
    element("p", {}, `Others: ${left.map(([role, rest]) => `${ROLE_NAMES[role]} ${percent(Math.max(rest, 0))}`).join(", ")}`),
  ];
}

function isSame(one, other) {
  return vocabulary.ids[one] === vocabulary.ids[other];
}

function meter(role, value) {
  return element("div", { class: "meter" },
    drawn("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
      drawn("rect", { class: "rail", width: 100, height: 8 }),
      drawn("rect", { class: `k-${role}`, width: Math.max(100 * value, value ? 1.5 : 0), height: 8 })),
    element("span", {}, percent(value)));
}

function tokenUnder(target) {
  return target instanceof Element && target.tagName === "U" ? target : null;
}

function listen() {
  document.body.append(pop);
  const area = byId("list");
  area.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return;
    const node = tokenUnder(event.target);
    if (node) showPop(node); else hidePop();
  });
  area.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hidePop(); });
  document.addEventListener("click", (event) => {
    const node = tokenUnder(event.target);
    if (node) showPop(node, true); else hidePop();
  });
  area.addEventListener("focusin", (event) => {
    const card = event.target.card;
    if (card?.tokens.length && event.target.matches(":focus-visible")) showPop(card.tokens[0]);
  });
  area.addEventListener("focusout", hidePop);
  addEventListener("scroll", () => { if (active && !isPhone.matches && !active.parentNode.matches(":focus")) hidePop(); }, { passive: true });
  document.addEventListener("keydown", keys);
  let width = innerWidth;
  addEventListener("resize", soon(() => {
    if (innerWidth === width) return;
    width = innerWidth;
    for (const card of cards) if (!card.look) card.node.style.minHeight = guess(card.index, byId("list").clientWidth);
  }));
}

function keys(event) {
  if (event.key === "Escape") { hidePop(); return; }
  const card = document.activeElement?.card;
  if (card && ["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) {
    event.preventDefault();
    step(card, event.key);
    return;
  }
  if (isTyping(event)) return;
  if (event.key === "/") { event.preventDefault(); byId("search").focus(); }
  if (event.key === "j" || event.key === "k") go(event.key === "j" ? 1 : -1);
  const name = page.colours[Number(event.key) - 1];
  if (name) { document.querySelector(`input[name=colour][value="${name}"]`).click(); }
}

function step(card, pressed) {
  const last = card.tokens.length - 1;
  const now = active?.parentNode === card.body ? active.place : -1;
  const place = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[pressed];
  const node = card.tokens[Math.max(0, Math.min(last, place))];
  node.scrollIntoView({ block: "nearest" });
  showPop(node, true);
}

// To the next demonstration, or the one before.
async function go(by) {
  const focused = document.activeElement?.card;
  const top = byId("tools").getBoundingClientRect().bottom;
  const below = cards.findIndex((card) => card.node.getBoundingClientRect().top >= top - 4);
  let place = focused ? Number(focused.node.dataset.place) + by
    : (below < 0 ? cards.length : below) - (by < 0 ? 1 : 0);
  place = Math.max(0, Math.min(cards.length - 1, place));
  const card = cards[place];
  if (!card) return;
  card.node.scrollIntoView({ block: "start" });
  card.isNear = true;
  if (!card.look) await draw(card);
  card.body?.focus({ preventScroll: true, focusVisible: true });
}

async function start() {
  startTheme();
  [page, vocabulary] = await Promise.all([readJson("head"), readJson("vocabulary")]);
  page.kinds = new Map(page.columns);
  summary();
  demonstrations();
  listen();
  document.documentElement.dataset.ready = "yes";
}

start().catch(failed);
