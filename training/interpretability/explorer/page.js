"use strict";
// Shows the contents of the page: the list of features, one feature, the list of alerts, or one alert. What is shown
// follows from the address: #features, #feature=ID, #alerts, #alert=ID (also ?feature=ID and ?alert=ID), and
// #alert=ID&feature=ID. Text of the contents becomes text nodes and attributes only, never HTML.
(() => {
const page = JSON.parse(document.getElementById("contents").textContent);
const view = document.getElementById("view");
const featurePlace = new Map(page.features.map((feature, i) => [String(feature.id), i]));
const alertPlace = new Map(page.alerts.map((alert, i) => [alert.id, i]));
const BAND_COLOURS = ["#8250df", "#1a7f37", "#cf222e", "#9a6700", "#bc4c00", "#6e4b00"];
const UNKNOWN_COLOUR = "#59636e";
const SVG = document.getElementById("drawing").namespaceURI; // spelt out, it would be an external address
const DETECTION = 0, UPPER_LIMIT = 1, TOKEN = -1;
const LIMIT_SIGMAS = 5;
const SHOWN_AT_ONCE = 100;
const STORE = "broker-filter explorer " + page.title;
const TYPING_PAUSE = 150;

// ---- elements ----
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined) element.append(child);
  }
  return element;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);
const put = (element, ...children) => fill(element, null, (element.replaceChildren(), children));
const svgTitle = (text) => s("title", null, text);

// ---- numbers ----
const number = (value, digits = 3) => {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  return Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(digits));
};
const signed = (value) => (value > 0 ? "+" : "") + number(value);
const percent = (value) => {
  if (value === null || value === undefined) return "–";
  const hundred = 100 * value;
  return (hundred !== 0 && Math.abs(hundred) < 0.1 ? number(hundred, 2) : hundred.toFixed(1)) + " %";
};
const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value || 0)), 0);
const sum = (values) => values.reduce((total, value) => total + (value || 0), 0);
const lift = (one) => `${number(one.lift.value, 2)}×` +
  (one.lift.low === null ? "" : ` (${number(one.lift.low, 2)} to ${number(one.lift.high, 2)})`);

// The colour of a DFA: blue for negative, white for 0, red for positive.
function diverging(value, most) {
  const t = most > 0 ? Math.max(-1, Math.min(1, (value || 0) / most)) : 0;
  const end = t < 0 ? [33, 102, 172] : [178, 24, 43];
  const strength = Math.sqrt(Math.abs(t));
  return `rgb(${end.map((c) => Math.round(247 + (c - 247) * strength)).join(",")})`;
}

// ---- names and notes, edited in the page ----
// A browser may refuse storage to a local file: edits then last until the page is closed.
let edits = {};
try { edits = JSON.parse(localStorage.getItem(STORE)) || {}; } catch { /* edits stay empty */ }
const nameOf = (feature) => (edits[feature.id] || {}).name ?? feature.name;
const noteOf = (feature) => (edits[feature.id] || {}).note ?? feature.note;
const titleOf = (feature) => nameOf(feature) ? `${feature.id} · ${nameOf(feature)}` : `Feature ${feature.id}`;
function edit(feature, key, value) {
  edits[feature.id] = { ...edits[feature.id], [key]: value };
  try { localStorage.setItem(STORE, JSON.stringify(edits)); } catch { /* see above */ }
}
function csv() {
  const quoted = (text) => /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const lines = page.rows.map((row) => {
    const feature = page.features[featurePlace.get(row.id)];
    const cells = feature ? { ...row, name: nameOf(feature), note: noteOf(feature) } : row;
    return page.columns.map((column) => quoted(String(cells[column] ?? ""))).join(",");
  });
  return [page.columns.join(","), ...lines, ""].join("\n");
}
document.getElementById("download").addEventListener("click", () => {
  const link = h("a", { href: URL.createObjectURL(new Blob([csv()], { type: "text/csv" })), download: "features.csv" });
  link.click();
  URL.revokeObjectURL(link.href);
  say("The browser saved features.csv.");
});

function say(text) { document.getElementById("status").textContent = text; }

// ---- pictures ----
function strip(alert, cellValues, most) {
  if (!alert.picture) return h("p", { class: "faint" }, "No cutouts.");
  const [y0, x0, height, width] = alert.box, gap = 2, total = 3 * width + 2 * gap;
  const drawing = s("svg", { class: "strip", viewBox: `0 0 ${total} ${height}`, role: "img",
    "aria-label": "science, template and difference cutouts" },
    svgTitle("science, template, difference"),
    s("image", { href: "data:image/png;base64," + alert.picture, width: total, height }));
  if (cellValues && cellValues.length) {
    for (let stamp = 0; stamp < 3; stamp++) {
      const left = stamp * (width + gap) - x0;
      const frame = s("svg", { x: stamp * (width + gap), y: 0, width, height, viewBox: `0 0 ${width} ${height}` });
      page.cells.forEach(([top, across, tall, wide], c) => frame.append(
        s("rect", { x: across - x0, y: height - (top - y0) - tall, width: wide, height: tall,
          fill: diverging(cellValues[c], most), stroke: "#fff", "stroke-width": 0.1, "stroke-opacity": 0.4,
          "fill-opacity": most > 0 ? 0.45 * Math.sqrt(Math.abs(cellValues[c] || 0) / most) : 0 },
          svgTitle(`cell ${c}: DFA ${signed(cellValues[c])}`))));
      drawing.append(frame);
    }
  }
  return drawing;
}

function marker(kind, x, y, r, attributes, title) {
  const shape = kind === DETECTION ? s("circle", { cx: x, cy: y, r })
    : kind === UPPER_LIMIT ? s("path", { d: `M${x - r},${y - r}h${2 * r}l${-r},${2 * r}z` })
    : s("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r });
  return fill(shape, attributes, title ? [svgTitle(title)] : []);
}

// A light curve; `active` (or null) is the feature whose DFA colours the points.
function lightCurve(alert, active, large) {
  const curve = alert.curve;
  if (!curve || !curve.days.length) return h("p", { class: "faint" }, "No light curve: the token alone is seen.");
  const W = large ? Math.max(340, Math.min(900, view.clientWidth)) : 360, H = large ? 300 : 170, left = 58, right = 8, top = 10, bottom = 32;
  const heights = curve.flux.map((flux, i) =>
    curve.kind[i] === UPPER_LIMIT ? LIMIT_SIGMAS * (curve.error[i] || 0) : flux);
  const framing = heights.filter((_, i) => curve.kind[i] === DETECTION);
  const shown = framing.length ? framing : heights;
  let low = Math.min(0, ...shown), high = Math.max(0, ...shown);
  const room = 0.25 * (high - low) || 1;
  low -= room; high += room;
  const oldest = Math.max(...curve.days), newest = Math.min(0, ...curve.days);
  const span = oldest - newest || 1, from = oldest + 0.04 * span, to = newest - 0.04 * span;
  const x = (days) => left + (W - left - right) * (from - days) / (from - to);
  const y = (flux) => Math.max(top, Math.min(H - bottom, top + (H - top - bottom) * (high - flux) / (high - low)));
  const dfa = new Map();
  if (active) alert.points.forEach((point, i) => dfa.set(point, active.sources[i]));
  const most = active ? largest(active.sources) : 0;
  const drawing = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img",
    "aria-label": `light curve with ${curve.days.length} points` + (active ? ", coloured by DFA" : "") });
  drawing.append(s("line", { x1: left, x2: W - right, y1: y(0), y2: y(0), stroke: "#d1d9e0" }));
  drawing.append(s("path", { d: `M${left},${top}V${H - bottom}H${W - right}`, fill: "none", stroke: "#8c959f" }));
  for (const tick of ticks(low, high, large ? 5 : 3)) {
    drawing.append(s("text", { x: left - 4, y: y(tick) + 4, "text-anchor": "end" }, compact(tick)));
  }
  for (const tick of ticks(to, from, large ? 8 : 4)) {
    drawing.append(s("line", { x1: x(tick), x2: x(tick), y1: H - bottom, y2: H - bottom + 3, stroke: "#8c959f" }));
    drawing.append(s("text", { x: x(tick), y: H - bottom + 14, "text-anchor": "middle" }, compact(tick)));
  }
  drawing.append(s("text", { x: (left + W) / 2, y: H - 3, "text-anchor": "middle" }, "days before the alert"));
  drawing.append(s("text", { transform: `translate(10,${(H - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" },
    "flux (nJy)"));
  const size = large ? 5.5 : 4.5;
  const order = curve.days.map((_, i) => i).sort((a, b) => Math.abs(dfa.get(a) || 0) - Math.abs(dfa.get(b) || 0));
  for (const i of order) {
    const band = page.bands[curve.band[i]] || "?", colour = BAND_COLOURS[curve.band[i]] || UNKNOWN_COLOUR;
    const seen = !active || dfa.has(i), px = x(curve.days[i]), py = y(heights[i]), error = curve.error[i];
    const lost = heights[i] < low || heights[i] > high;
    const label = `${band}, ${page.kinds[curve.kind[i]]}, ${number(curve.days[i])} days before, ` +
      `${number(heights[i])} nJy` + (error === null ? "" : ` ± ${number(error)}`) +
      (lost ? ", beyond the axis" : "") +
      (active ? (seen ? `, DFA ${signed(dfa.get(i))}` : ", not seen by the network") : "");
    if (curve.kind[i] !== UPPER_LIMIT && error !== null && !lost) {
      drawing.append(s("line", { x1: px, x2: px, y1: y(heights[i] - error), y2: y(heights[i] + error), stroke: colour,
        "stroke-opacity": seen ? 0.7 : 0.25 }));
    }
    const isQuery = active && active.query === i && alert.points.length && page.kind === "points";
    if (isQuery) drawing.append(s("circle", { cx: px, cy: py, r: size + 4, fill: "none", stroke: "#1f2328" }));
    drawing.append(marker(curve.kind[i], px, py, size, {
      fill: active && seen ? diverging(dfa.get(i), most) : seen ? "#fff" : "none", stroke: colour,
      "stroke-width": 1.6, "stroke-opacity": seen ? 1 : 0.3 }, label));
    if (large) drawing.append(s("text", { x: px + size + 2, y: py + 4, fill: colour, "aria-hidden": true }, band));
  }
  return drawing;
}
const compact = (value) => {
  const size = Math.abs(value);
  if (size >= 1e6) return +(value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(3) + "k";
  return String(+value.toPrecision(3));
};
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= raw);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(k * step);
  return found;
}
function legend(withCells) {
  const sample = (kind) => s("svg", { viewBox: "0 0 16 16", "aria-hidden": true },
    marker(kind, 8, 8, 5, { fill: "#fff", stroke: UNKNOWN_COLOUR, "stroke-width": 1.6 }));
  const ramp = h("span", null, "DFA: negative ", h("span", { class: "ramp", "aria-hidden": true }), " positive");
  if (withCells) return h("div", { class: "legend" }, ramp);
  const used = new Set(page.alerts.flatMap((alert) => alert.curve ? alert.curve.band : []));
  const bands = page.bands.map((band, i) => [band, BAND_COLOURS[i], i]).filter(([, , i]) => used.has(i));
  return h("div", { class: "legend" }, ramp,
    page.kinds.map((kind, k) => h("span", null, sample(k), " " + kind)),
    bands.map(([band, colour]) => h("span", null, s("svg", { viewBox: "0 0 16 16", "aria-hidden": true },
      s("circle", { cx: 8, cy: 8, r: 5, fill: "none", stroke: colour, "stroke-width": 2.5 })), ` band ${band}`)),
    h("span", null, "ring: the point where the feature is read"), h("span", null, "faint: not seen by the network"));
}
// Horizontal bars around a common zero; `rows`: [label, value, text, colour (by the sign of the value if absent)].
function bars(rows, label) {
  const most = largest(rows.map((row) => row[1])), below = rows.some((row) => row[1] < 0);
  return h("div", { class: "bars", role: "group", "aria-label": label }, rows.map(([name, value, text, colour]) => {
    const zero = below ? 50 : 0, length = most > 0 ? (100 - zero) * Math.abs(value || 0) / most : 0;
    return [h("span", null, name), s("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": true },
      s("rect", { x: value < 0 ? zero - length : zero, y: 1, width: length, height: 8,
        fill: colour || (value < 0 ? "#2166ac" : "#b2182b") })), h("span", null, text)];
  }));
}
function histogram(data) {
  const W = 360, H = 150, left = 40, bottom = 30, top = 8, most = Math.max(1, ...data.counts);
  const scale = (count) => (H - top - bottom) * Math.log1p(count) / Math.log1p(most);
  const step = (W - left - 6) / data.counts.length, ticked = [0, Math.floor(data.counts.length / 2), data.counts.length];
  return s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img",
    "aria-label": `histogram of the activation; ${data.zero} alerts without activation` },
    data.counts.map((count, i) => s("rect", { x: left + i * step, y: H - bottom - scale(count), width: step - 1,
      height: scale(count), fill: "#0969da" },
      svgTitle(`${number(data.edges[i])} to ${number(data.edges[i + 1])}: ${count} alerts`))),
    s("path", { d: `M${left},${top}V${H - bottom}H${W - 6}`, fill: "none", stroke: "#8c959f" }),
    s("text", { x: left - 4, y: top + 8, "text-anchor": "end" }, String(most)),
    s("text", { x: left - 4, y: H - bottom, "text-anchor": "end" }, "0"),
    ticked.map((i) => s("text", { x: left + i * step, y: H - bottom + 13,
      "text-anchor": i === data.counts.length ? "end" : "middle" },
      number(data.edges[i], 2))),
    s("text", { x: (left + W) / 2, y: H - 2, "text-anchor": "middle" }, "activation (alerts on a logarithmic scale)"));
}
function cellMap(values) {
  const high = Math.max(...page.cells.map(([top, , tall]) => top + tall));
  const wide = Math.max(...page.cells.map(([, left, , across]) => left + across)), most = largest(values);
  return s("svg", { viewBox: `0 0 ${wide} ${high}`, class: "map", role: "img", "aria-label": "mean DFA by cell" },
    page.cells.map(([top, left, tall, across], c) => s("rect", { x: left, y: high - top - tall, width: across,
      height: tall, fill: diverging(values[c], most), stroke: "#d1d9e0", "stroke-width": 0.2 },
      svgTitle(`cell ${c}: mean DFA ${signed(values[c])}`))));
}

// ---- tables ----
// `columns`: [title, cell, class]; on narrow screens each row becomes a block with the titles as labels.
function table(columns, rows, attributes) {
  return h("div", { class: "wide" }, h("table", { class: "stack", ...attributes },
    h("thead", null, h("tr", null, columns.map(([title, , kind]) => h("th", { scope: "col", class: kind }, title)))),
    h("tbody", null, rows.map((row) => h("tr", null, columns.map(([title, cell, kind]) =>
      h("td", { class: kind, "data-label": kind === "name left" ? null : title }, cell(row))))))));
}
const featureLink = (place) => {
  const feature = page.features[place];
  return h("a", { href: `#feature=${feature.id}` }, titleOf(feature));
};
const alertLink = (alert, feature) =>
  h("a", { href: `#alert=${alert.id}` + (feature ? `&feature=${feature.id}` : "") }, alert.object || alert.id);

// ---- the list of features ----
const LIST = [
  ["feature", (f) => featureLink(featurePlace.get(String(f.id))), (f) => nameOf(f).toLowerCase() || `~${f.id}`, "name left"],
  ["frequency", (f) => percent(f.frequency), (f) => f.frequency, null],
  ["stable in", (f) => f.stable_in === null ? "–" : `${f.stable_in} of ${page.seeds}`, (f) => f.stable_in, null],
  ["most enriched class", (f) => f.enriched ? f.enriched.name : "–", (f) => f.enriched ? f.enriched.name : "", "left"],
  ["lift (95 %)", (f) => f.enriched ? lift(f.enriched) : "–", (f) => f.enriched ? f.enriched.lift.value : null, null],
  ["family", (f) => f.family || "–", (f) => f.family, "left"],
  ["main head", (f) => String(f.main_head), (f) => f.main_head, null],
  ["effect", (f) => number(f.effect), (f) => f.effect, null],
];
const list = { sort: "frequency", down: true, text: "", family: "", enriched: "", stable: false };
function compare(value, down) {
  return (a, b) => {
    const x = value(a), y = value(b);
    if (x === null || x === undefined) return y === null || y === undefined ? 0 : 1;
    if (y === null || y === undefined) return -1;
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
  };
}
function matching() {
  const text = list.text.toLowerCase();
  const found = page.features.filter((f) =>
    (!list.family || f.family === list.family) && (!list.enriched || (f.enriched && f.enriched.name === list.enriched)) &&
    (!list.stable || (f.stable_in !== null && 2 * f.stable_in > page.seeds)) &&
    (!text || [titleOf(f), noteOf(f), f.family, f.enriched ? f.enriched.name : ""].join(" ").toLowerCase().includes(text)));
  const [, , value] = LIST.find(([title]) => title === list.sort);
  return found.sort(compare(value, list.down));
}
function select(label, key, options, changed) {
  return h("label", null, label, h("select", { onchange: (event) => { list[key] = event.target.value; changed(); } },
    options.map(([value, text]) => h("option", { value, selected: list[key] === value }, text))));
}
function showFeatures() {
  const holder = h("div");
  const changed = () => {
    const found = matching();
    const sortBy = (title) => {
      list.down = list.sort === title ? !list.down : title !== "feature";
      list.sort = title;
      changed();
      holder.querySelector(`[data-sort="${title}"]`).focus();
    };
    put(holder, 
      h("p", { class: "faint", role: "status" }, `${found.length} of ${page.features.length} features. ` +
        `Main head: the head with the greatest share of the attribution. Effect: ${page.effect}.`),
      table(LIST.map(([title, cell, , kind]) => [title, cell, kind]), found, { id: "list" }));
    holder.querySelectorAll("th").forEach((th, i) => {
      const title = LIST[i][0], chosen = list.sort === title;
      if (chosen) th.setAttribute("aria-sort", list.down ? "descending" : "ascending");
      th.replaceChildren(h("button", { type: "button", "data-sort": title, onclick: () => sortBy(title) },
        title + (chosen ? (list.down ? " ▾" : " ▴") : "")));
    });
  };
  const distinct = (values) => [...new Set(values.filter(Boolean))].sort().map((value) => [value, value]);
  const every = [["", "all"]];
  const search = h("input", { type: "search", value: list.text,
    oninput: (event) => { list.text = event.target.value; changed(); } });
  const stable = h("input", { type: "checkbox", onchange: (event) => { list.stable = event.target.checked; changed(); } });
  stable.checked = list.stable;
  put(view, h("h2", null, "Features"),
    h("div", { class: "filters", role: "search", "aria-label": "Filter the features" },
      h("label", null, "Search", search),
      select("Family", "family", [...every, ...distinct(page.features.map((f) => f.family))], changed),
      select("Class", "enriched", [...every, ...distinct(page.features.map((f) => f.enriched && f.enriched.name))], changed),
      select("Sort by", "sort", LIST.map(([title]) => [title, title]), changed),
      h("label", null, stable, "stable in most seeds")), holder);
  changed();
}

// ---- one feature ----
function card(example, feature, place) {
  const alert = page.alerts[example.alert];
  const active = alert.active.find((one) => one.feature === place) || null;
  const cells = page.kind === "cells" && active ? active.sources : null;
  return h("article", { class: "card" },
    h("div", { class: "head" }, alertLink(alert, feature),
      h("span", { class: "faint" }, [alert.label, alert.survey].filter(Boolean).join(", ")),
      h("span", null, `activation ${number(example.activation)}`)),
    strip(alert, cells, cells ? largest(cells) : 0),
    alert.curve ? lightCurve(alert, page.kind === "points" ? active : null, false) : null);
}
function headShares(feature) {
  const rows = feature.heads_by_weight.map((weight, i) => [i, weight, feature.heads_by_dfa[i]]);
  return [bars(rows.flatMap(([i, weight, dfa]) => [
    [`head ${i}, weights`, weight, percent(weight), "#6e7781"], [`head ${i}, DFA`, dfa, percent(dfa), "#0969da"]]), "shares of the heads"),
    h("p", { class: "faint" }, "Weights: |W_dec| of the head over the sum of all heads. DFA: the head's share of the " +
      "absolute direct feature attribution over the active alerts. The two need not agree.")];
}
function showFeature(feature, place) {
  const before = page.features[place - 1], after = page.features[place + 1];
  const heading = h("h2", null, titleOf(feature));
  const input = (key, value, label) => h("input", { id: `edit-${key}`, value, maxlength: key === "name" ? 80 : 500,
    "aria-label": label, oninput: (event) => {
      edit(feature, key, event.target.value);
      heading.textContent = titleOf(feature);
    } });
  const facts = [["frequency", percent(feature.frequency)],
    ["stable in", feature.stable_in === null ? "–" : `${feature.stable_in} of ${page.seeds} seeds`],
    ["family", feature.family || "–"], ["main head", String(feature.main_head)],
    ["most enriched class", feature.enriched ? `${feature.enriched.name}, ${lift(feature.enriched)}` : "–"],
    ["effect of ablation", number(feature.effect)]];
  const right = [];
  if (feature.lags.length) right.push(h("section", null, h("h3", null, "Mean DFA by days before the alert"),
    bars(feature.lags.map((lag) => [lag.label, lag.signed, `${signed(lag.signed)} (${percent(lag.share)})`]),
      "mean DFA by days before the alert"),
    h("p", { class: "faint" }, "In parentheses the share of the absolute attribution.")));
  if (feature.cells.length) right.push(h("section", null, h("h3", null, "Mean DFA by cell"), cellMap(feature.cells)));
  put(view, 
    h("nav", { "aria-label": "Features" },
      before ? h("a", { href: `#feature=${before.id}`, rel: "prev" }, "← previous") : null,
      h("a", { href: "#features" }, "all features"),
      after ? h("a", { href: `#feature=${after.id}`, rel: "next" }, "next →") : null),
    heading,
    h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value)))),
    h("div", { class: "editor" }, h("label", { for: "edit-name" }, "Name"), input("name", nameOf(feature), "Name"),
      h("label", { for: "edit-note" }, "Note"), input("note", noteOf(feature), "Note")),
    h("h3", null, `Most active alerts, one of each object (${feature.top.length})`),
    legend(page.kind === "cells"),
    h("div", { class: "cards" }, feature.top.map((example) => card(example, feature, place))),
    feature.groups.map((group) => h("section", null, h("h3", null, group.label),
      h("div", { class: "cards" }, group.examples.map((example) => card(example, feature, place))))),
    h("div", { class: "columns" },
      h("section", null, h("h3", null, "Activation"), histogram(feature.histogram),
        h("p", { class: "faint" }, `${feature.histogram.zero} alerts do not activate the feature.`)),
      h("section", null, h("h3", null, "Classes of the active alerts"),
        table([["class", (e) => e.name, "left"], ["alerts", (e) => String(e.alerts)], ["share", (e) => percent(e.share)],
          ["lift (95 %)", lift]], feature.enrichment)),
      h("section", null, h("h3", null, "Heads"), headShares(feature)),
      right,
      h("section", null, h("h3", null, "Effect of ablation"),
        table([["output", (e) => e.output, "left"], ["feature", (e) => number(e.effect)],
          ["random direction", (e) => number(e.random)]], feature.effects),
        h("p", { class: "faint" }, "Mean absolute change over the active alerts of the page. A random direction of " +
          "equal size is the comparison.")),
      h("section", null, h("h3", null, "Nearest features"),
        feature.nearest.length ? table([["feature", (n) => featureLink(n.feature), "name left"],
          ["cosine of decoder directions", (n) => number(n.cosine)]], feature.nearest)
          : h("p", { class: "faint" }, "There is no other feature."))));
}

// ---- the list of alerts ----
const search = { text: "" };
function showAlerts(problem) {
  const holder = h("div");
  const columns = [
    ["object", (a) => alertLink(a, null), "name left"], ["alert", (a) => a.id, "left"],
    ["class", (a) => a.label || "–", "left"], ["survey", (a) => a.survey, "left"], ["split", (a) => a.split, "left"],
    ["most active feature", (a) => a.active.length ? featureLink(a.active[0].feature) : "none", "left"],
    ["unexplained", (a) => percent(a.unexplained)]];
  const changed = () => {
    const text = search.text.toLowerCase();
    const found = page.alerts.filter((a) => [a.id, a.object, a.label, a.survey, a.split].join(" ").toLowerCase().includes(text));
    put(holder, h("p", { class: "faint", role: "status" }, `${found.length} of ${page.alerts.length} alerts` +
      (found.length > SHOWN_AT_ONCE ? `; the first ${SHOWN_AT_ONCE} are shown` : "")),
      table(columns, found.slice(0, SHOWN_AT_ONCE)));
  };
  let waiting = 0;
  const typed = (event) => {
    search.text = event.target.value;
    clearTimeout(waiting);
    waiting = setTimeout(changed, TYPING_PAUSE);
  };
  put(view, h("h2", null, "Alerts"), problem ? h("p", { class: "warning", role: "alert" }, problem) : "",
    h("div", { class: "filters", role: "search", "aria-label": "Find alerts" },
      h("label", null, "Alert, object or class", h("input", { type: "search", value: search.text, oninput: typed }))),
    holder);
  changed();
}

// ---- one alert ----
const sourceName = (alert, source) => {
  if (page.kind === "cells") return `cell ${source}`;
  if (source === TOKEN || !alert.curve) return "token";
  const curve = alert.curve;
  return `${page.bands[curve.band[source]] || "?"} ${page.kinds[curve.kind[source]]}, ${number(curve.days[source])} d before`;
};
function sourcesOf(alert, active) {
  const places = page.kind === "cells" ? active.sources.map((_, i) => i) : alert.points;
  const rows = places.map((place, i) => [sourceName(alert, place), active.sources[i]]);
  rows.push(["biases", active.bias]);
  rows.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "DFA by source" },
    bars(rows.map(([name, value]) => [name, value, signed(value)]), "DFA by source"));
}
function showAlert(alert, wanted) {
  const detail = h("div");
  const choose = (active) => {
    view.querySelectorAll("#active tbody tr").forEach((row, i) => {
      row.classList.toggle("chosen", alert.active[i] === active);
      row.querySelector("button").setAttribute("aria-pressed", String(alert.active[i] === active));
    });
    const cells = page.kind === "cells" && active ? active.sources : null;
    const pictures = [h("h3", null, "Cutouts: science, template, difference"),
      h("div", { class: "cutouts" }, strip(alert, cells, cells ? largest(cells) : 0))];
    if (alert.curve) pictures.push(h("h3", null, "Light curve"),
      lightCurve(alert, page.kind === "points" ? active : null, true));
    if (!active) { put(detail, pictures); return; }
    const at = page.kind === "cells" ? `cell ${active.query}` : sourceName(alert, active.query);
    put(detail, 
      h("h3", null, featureLink(active.feature), `: activation ${number(active.activation)}, read at ${at}`),
      legend(page.kind === "cells"), pictures,
      h("div", { class: "columns" },
        h("section", null, h("h3", null, "Heads"),
          bars(active.heads.map((value, i) => [`head ${i}`, value, signed(value)]), "DFA by head")),
        h("section", null, h("h3", null, page.kind === "cells" ? "DFA by cell" : "DFA by point"),
          sourcesOf(alert, active)),
        active.leaves.length ? h("section", null, h("h3", null, "Recursive attribution (RDFA)"),
          h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "RDFA" },
            bars(active.leaves.map((leaf) => [leaf.name, leaf.value, signed(leaf.value)]), "RDFA"))) : null,
        active.after.length ? h("section", null, h("h3", null, "Before and after the ablation of this feature"),
          table([["output", (i) => page.outputs[i], "left"], ["before", (i) => number(alert.before[i], 4)],
            ["after", (i) => number(active.after[i], 4)],
            ["change", (i) => alert.before[i] === null || active.after[i] === null ? "–"
              : signed(active.after[i] - alert.before[i])]],
            page.outputs.map((_, i) => i))) : null));
  };
  const mainHead = (active) => active.heads.reduce((best, value, i) =>
    Math.abs(value) > Math.abs(active.heads[best]) ? i : best, 0);
  put(view, 
    h("nav", { "aria-label": "Alerts" }, h("a", { href: "#alerts" }, "all alerts")),
    h("h2", null, `Alert ${alert.id}`),
    h("dl", { class: "facts" }, [["object", alert.object || "–"], ["class", alert.label || "–"],
      ["survey", alert.survey], ["split", alert.split], ["active features", String(alert.actives)],
      ["unexplained share of z", `${percent(alert.unexplained)}` + (alert.percentile === null ? "" :
        `, more than ${number(alert.percentile, 3)} % of the alerts`)]]
      .map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value)))),
    alert.percentile !== null && alert.percentile >= 95
      ? h("p", { class: "warning" }, "These features do not explain this alert: little of its z is reconstructed.") : "",
    h("h3", null, "Active features"),
    alert.actives > alert.active.length
      ? h("p", { class: "faint" }, `The page holds the attributions of ${alert.active.length} of them.`) : "",
    alert.active.length ? table([
      ["feature", (a) => featureLink(a.feature), "name left"], ["activation", (a) => number(a.activation)],
      ["frequency", (a) => percent(page.features[a.feature].frequency)],
      ["main head", (a) => String(mainHead(a))],
      ["DFA of the sources", (a) => signed(sum(a.sources))], ["of the biases", (a) => signed(a.bias)],
      ["", (a) => h("button", { type: "button", "aria-pressed": "false", onclick: () => choose(a) }, "show")],
    ], alert.active, { id: "active" }) : h("p", null, "No feature is active."), detail);
  choose(alert.active.find((active) => String(page.features[active.feature].id) === wanted) || alert.active[0] || null);
}

// ---- addresses ----
function show() {
  const address = new URLSearchParams(location.hash.slice(1));
  const asked = new URLSearchParams(location.search);
  const chosen = [...address.keys()].length ? address : asked;
  const alertId = chosen.get("alert"), featureId = chosen.get("feature");
  document.getElementById("summary").hidden = alertId !== null || featureId !== null || chosen.has("alerts");
  let title = "Features";
  if (alertId !== null) {
    title = `Alert ${alertId}`;
    const place = alertPlace.get(alertId);
    if (place === undefined) showAlerts(`The page has no alert ${alertId}.`);
    else showAlert(page.alerts[place], featureId);
  } else if (featureId !== null && featurePlace.has(featureId)) {
    const place = featurePlace.get(featureId);
    title = titleOf(page.features[place]);
    showFeature(page.features[place], place);
  } else if (chosen.has("alerts")) {
    title = "Alerts";
    showAlerts(null);
  } else {
    document.getElementById("summary").hidden = false;
    showFeatures();
  }
  document.title = `${title} · ${page.title}`;
  for (const [id, name] of [["to-features", "Features"], ["to-alerts", "Alerts"]]) {
    document.getElementById(id).setAttribute("aria-current", title === name ? "page" : "false");
  }
}
window.addEventListener("hashchange", () => {
  show();
  window.scrollTo(0, 0);
  document.getElementById("main").focus({ preventScroll: true });
});
show();
})();
