// The page: a list of alerts, one alert in detail, labels by keyboard, and live counts.
import { find, h, number, put, shown } from "./dom.js";
import { lightCurve } from "./light_curve.js";

const TOKEN = document.querySelector('meta[name="watch-token"]').content;
const MJD_OF_1970 = 40587, MS_PER_DAY = 86400000;
const TYPING_PAUSE_MS = 250;
const CUTOUTS = ["science", "template", "difference"];
const MAIN_COLUMNS = ["magpsf", "sigmapsf", "psfFlux", "psfFluxErr", "snr", "isdiffpos", "sso", "ndethist", "drb", "rb", "reliability",
  "extendedness", "fwhm", "diffmaglim", "distnr", "magnr", "sgscore1", "distpsnr1", "ssdistnr", "neargaia", "maggaia", "visit", "detector"];

let night = null; // what the server says of the night: classes, names of scores and filters, counts
let rows = []; // the alerts of the list's page
let alert = null; // the alert in detail
let until = null; // number of the newest alert in the list
let pageOfList = 0, pagesOfList = 0, found = 0;
let unit = "magnitude";
let inverted = false;
let counts = null;
const history_ = []; // labels before each change, for undo
let listRequest = null, detailRequest = null;

// ---- requests ----
async function get(address, signal) {
  const answer = await fetch(address, { signal });
  const content = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
  if (!answer.ok) throw new Error(content.error);
  return content;
}

async function attempt(work) {
  try {
    await work();
    return true;
  } catch (error) {
    if (error.name === "AbortError") return false;
    say(error instanceof TypeError ? "The server does not answer: is the command still running?" : error.message, true);
    return false;
  }
}

function say(text, isProblem = false) {
  find("said").textContent = text;
  if (isProblem) showProblem(text);
}

function showProblem(text) {
  find("problem").hidden = !text;
  find("problem").textContent = text;
}

// ---- texts ----
const time = (mjd) => {
  const date = new Date((mjd - MJD_OF_1970) * MS_PER_DAY);
  return Number.isNaN(date.getTime()) ? "?" : date.toISOString().slice(0, 19).replace("T", " ");
};
const plural = (count, name) => `${count.toLocaleString("en")} ${name}${count === 1 ? "" : "s"}`;

function sexagesimal(degrees, perUnit, digits) {
  const size = Math.abs(degrees) / perUnit;
  let whole = Math.floor(size), minutes = Math.floor(60 * (size - whole));
  let seconds = (3600 * (size - whole) - 60 * minutes).toFixed(digits);
  if (Number(seconds) >= 60) { seconds = (0).toFixed(digits); minutes += 1; }
  if (minutes >= 60) { minutes -= 60; whole += 1; }
  const two = (value) => String(value).padStart(2, "0");
  return `${two(whole)}:${two(minutes)}:${seconds.padStart(digits + 3, "0")}`;
}
const position = (ra, dec) => `${sexagesimal(ra, 15, 2)} ${dec < 0 ? "−" : "+"}${sexagesimal(dec, 1, 1)}`;

// ---- the list ----
function query() {
  const values = { sort: find("sort").value };
  for (const name of ["text", "label", "survey", "passed"]) if (find(name).value) values[name] = find(name).value;
  const low = find("low").value, high = find("high").value;
  if (low || high) Object.assign(values, { score: find("score").value }, low && { low }, high && { high });
  return values;
}

// Loads a page of the list. `fresh` includes the alerts that arrived since the list was last made.
async function loadList(page, fresh = false) {
  listRequest?.abort();
  listRequest = new AbortController();
  const { signal } = listRequest;
  return attempt(async () => {
    const parameters = new URLSearchParams({ ...query(), page, ...(until !== null && !fresh ? { until } : {}) });
    const answer = await get(`api/alerts?${parameters}`, signal);
    if (page && page >= answer.pages) { await loadList(Math.max(0, answer.pages - 1), fresh); return; }
    ({ alerts: rows, page: pageOfList, pages: pagesOfList, found, until } = answer);
    showCounts(answer);
    drawList();
  });
}

function drawList() {
  const begin = pageOfList * 50;
  find("found").textContent = rows.length ? `${begin + 1} to ${begin + rows.length} of ${plural(found, "alert")}` :
    until ? "No alert is selected: change the order or the filters above." : "No alert has arrived yet.";
  put(find("list"), rows.map(row));
  find("pages").hidden = pagesOfList < 2;
  find("page-number").textContent = `page ${pageOfList + 1} of ${pagesOfList}`;
  find("previous").disabled = pageOfList === 0;
  find("next").disabled = pageOfList + 1 >= pagesOfList;
  markSelected();
}

function row(one) {
  const score = shownScore();
  const value = score === "anomaly" ? one.anomaly : one.scores[score];
  return h("li", null, h("button", { type: "button", class: "alert", "data-id": one.id, onclick: () => select(one.id, true) },
    one.pictures ? h("img", { class: "strip", src: `api/alerts/${one.id}/strip.png?n=${one.number}`, alt: "", width: 193, height: 63, loading: "lazy" }) :
      h("span", { class: "strip nothing" }, "no cutouts"),
    h("span", { class: "facts" },
      h("span", { class: "name" }, h("span", null, shown(one.object) || "without a name"), tags(one)),
      h("span", { class: "faint" }, [one.magnitude === null ? null : `${one.band || "?"} ${one.magnitude.toFixed(1)}`, time(one.mjd).slice(0, 16)].filter(Boolean).join(" · ")),
      h("span", { class: "faint reason" }, value === undefined || value === null ? null : [`${scoreName(score)} `, h("b", null, number(value))],
        one.reason ? `${value === undefined || value === null ? "" : " · "}${shown(one.reason)}` : null))));
}

const tags = (one) => [
  one.label ? h("span", { class: `tag label-${one.label === "real" || one.label === "bogus" ? one.label : "class"}` }, one.label) : null,
  one.interesting ? h("span", { class: "tag interesting", title: "interesting" }, "★") : null,
];
const scoreName = (name) => name === "anomaly" ? "anomaly" : name;

// The score that the rows show: the one that sorts or filters the list.
function shownScore() {
  const sort = find("sort").value.replace(/^-/, "");
  if (night.scores.includes(sort)) return sort;
  return sort !== "strangest" && (find("low").value || find("high").value) ? find("score").value : rows.some((one) => one.anomaly !== null) ? "anomaly" : find("score").value;
}

function markSelected() {
  for (const button of find("list").querySelectorAll("button.alert")) {
    if (button.dataset.id === alert?.id) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

const selectedPlace = () => rows.findIndex((one) => one.id === alert?.id);

async function move(step) {
  const place = selectedPlace();
  const next = place < 0 ? 0 : place + step;
  if (next >= 0 && next < rows.length) return select(rows[next].id);
  const page = pageOfList + Math.sign(step);
  if (page < 0 || page >= pagesOfList) { say(step > 0 ? "This is the last alert." : "This is the first alert."); return null; }
  await loadList(page);
  return rows.length ? select(rows[step > 0 ? 0 : rows.length - 1].id) : null;
}

// ---- the alert ----
async function select(id, open = false) {
  detailRequest?.abort();
  detailRequest = new AbortController();
  const { signal } = detailRequest;
  const done = await attempt(async () => { alert = await get(`api/alerts/${id}`, signal); });
  if (!done) return;
  window.history.replaceState(null, "", `#${id}`);
  if (open) document.body.classList.add("reading"); // before drawing: a hidden part has no width
  drawDetail();
  markSelected();
  const button = find("list").querySelector(`button[data-id="${CSS.escape(id)}"]`);
  button?.scrollIntoView({ block: "nearest" });
  if (open) find("detail").scrollTop = 0;
  if (open && !button?.checkVisibility()) find("detail").focus({ preventScroll: true });
  if (!open && button?.checkVisibility()) button.focus({ preventScroll: true });
}

function drawDetail() {
  const one = alert, note = one.annotation;
  put(find("detail"),
    h("button", { type: "button", class: "back", onclick: back }, "← List"),
    h("header", { class: "title" }, h("h2", null, shown(one.object) || "without a name", " ", h("span", { class: "tags" }, tags(one))),
      h("p", { class: "faint" }, `${one.survey === "ztf" ? "ZTF" : one.survey === "lsst" ? "LSST" : shown(one.survey)} alert ${one.id}`,
        one.list ? ` · number ${one.list.place} of the list${one.list.reason ? `: ${shown(one.list.reason)}` : ""}` : null)),
    labelBar(one),
    h("div", { class: "cutouts" }, one.cutouts.length ? CUTOUTS.map((name) => cutout(one, name)) :
      h("p", { class: "faint" }, "The record holds no cutouts.")),
    h("dl", { class: "facts" },
      fact("magnitude", one.magnitude === null ? "–" : `${one.band || "?"} = ${one.magnitude.toFixed(2)}`),
      fact("time", `${time(one.mjd)}`, `MJD ${one.mjd.toFixed(5)}, ${one.time_scale}`),
      fact("position (ICRS)", position(one.ra, one.dec), `${one.ra.toFixed(6)} ${one.dec >= 0 ? "+" : ""}${one.dec.toFixed(6)} deg`)),
    linksOf(one),
    lightCurve(one, unit, find("detail").clientWidth, (chosen) => { unit = chosen; drawDetail(); find("detail").querySelector(`[data-unit="${chosen}"]`).focus(); }),
    h("div", { class: "columns" }, anomalyOf(one, note.anomaly), scoresOf(note), filtersOf(note), matchesOf(note)),
    columnsOf(one), provenance(one, note));
}

const fact = (name, value, more) => h("div", null, h("dt", null, name), h("dd", null, value, more ? h("span", { class: "faint" }, more) : null));

function cutout(one, name) {
  const has = one.cutouts.includes(name);
  return h("figure", null, has ? h("img", { class: inverted ? "cutout inverted" : "cutout", src: `api/alerts/${one.id}/${name}.png?n=${one.number}`, alt: `${name} image` }) :
    h("span", { class: "cutout nothing" }, "none"), h("figcaption", null, name));
}

function linksOf(one) {
  const safe = one.links.filter((link) => link.url.startsWith("https://"));
  return h("p", { class: "links" }, h("span", { class: "faint" }, "Look up "),
    safe.map((link) => h("a", { href: link.url, target: "_blank", rel: "noopener noreferrer" }, link.name)));
}

const section = (title, ...children) => h("section", null, h("h3", null, title), children);
const isRecord = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const records = (value) => Array.isArray(value) ? value.filter(isRecord) : [];

function scoresOf(note) {
  const models = records(note.models).filter((model) => isRecord(model.outputs) && Object.keys(model.outputs).length);
  if (!models.length) return section("Scores", h("p", { class: "faint" }, "The record has no scores. The command scores raw packets with --model."));
  return section("Scores", models.map((model) => [
    h("h4", null, `${shown(model.model)} ${shown(model.version)}`, model.shadow === true ? h("span", { class: "tag" }, "shadow") : null),
    h("table", { class: "scores" }, h("tbody", null, Object.entries(model.outputs).map(([name, value]) => h("tr", null,
      h("th", { scope: "row" }, shown(name)),
      h("td", null, typeof value === "number" ? h("meter", { min: 0, max: 1, value, "aria-hidden": "true" }) : null),
      h("td", { class: "number" }, number(value))))))]));
}

function filtersOf(note) {
  const filters = records(note.filters);
  if (!filters.length) return null;
  return section("Filters", h("ul", { class: "plain" }, filters.map((one) => h("li", { class: one.passed === true ? "" : "faint" },
    h("span", { "aria-hidden": "true" }, one.passed === true ? "✓ " : "✗ "), shown(one.name), one.passed === true ? " passed" : " not passed",
    one.revision ? h("span", { class: "faint" }, ` revision ${shown(one.revision)}`) : null))));
}

function matchesOf(note) {
  const matches = records(note.matches);
  if (!matches.length) return null;
  return section("Near targets", h("ul", { class: "plain" }, matches.map((one) =>
    h("li", null, `${shown(one.name)} of ${shown(one.list)}, ${number(one.separation)} arcsec`))));
}

function anomalyOf(one, anomaly) {
  if (!isRecord(anomaly)) return section("Anomaly", h("p", { class: "faint" }, "The alert was not compared with ordinary alerts."));
  const flagged = anomaly.flag === true;
  const threshold = typeof anomaly.threshold === "number" ? ` (threshold ${number(anomaly.threshold)})` : "";
  const reason = isRecord(anomaly.reason) ? anomaly.reason : {};
  const modalities = isRecord(reason.modalities) ? Object.entries(reason.modalities) : [];
  return section("Anomaly",
    h("p", null, "Score ", h("b", { class: flagged ? "strange" : null }, number(anomaly.score)), `${threshold}, ${flagged ? "flagged" : "not flagged"}.`,
      reason.most_unlike ? [" Most unlike ordinary alerts in its ", h("b", null, shown(reason.most_unlike).replaceAll("_", " ")), "."] : null),
    modalities.length ? [h("h4", { class: "plain" }, "Distance from ordinary alerts, in standard deviations"), h("table", null,
      h("tbody", null, modalities.map(([name, value]) => h("tr", null, h("th", { scope: "row" }, shown(name).replaceAll("_", " ")), h("td", { class: "number" }, number(value))))))] : null,
    records(reason.lenses).map((lens) => h("p", null, `${shown(lens.lens)}: ${shown(lens.says)}`)),
    records(reason.features).length ? h("ul", { class: "plain" }, records(reason.features).map((feature) => h("li", null,
      `feature ${number(feature.id)}${feature.name ? ` (${shown(feature.name)})` : ""}: activation ${number(feature.activation)}, rarity ${number(feature.rarity)}` +
      (typeof feature.effect === "number" ? `, effect ${number(feature.effect)}` : "")))) : null,
    neighboursOf(one, records(reason.neighbours)));
}

function neighboursOf(one, neighbours) {
  if (!neighbours.length) return null;
  return [h("h4", { class: "plain" }, "Most similar ordinary alerts, and their cosine distance"), h("table", null, h("tbody", null, neighbours.map((near) => h("tr", null,
    h("td", null, one.here.includes(near.alert_id) ? h("button", { type: "button", class: "link", onclick: () => select(near.alert_id) }, shown(near.object_id)) : shown(near.object_id)),
    h("td", { class: "faint" }, shown(near.alert_id)), h("td", { class: "number" }, number(near.distance))))))];
}

function columnsOf(one) {
  if (!one.columns.length) return null;
  const line = (column) => h("tr", null, h("th", { scope: "row" }, column.name), h("td", { class: "number" }, number(column.value, 6)), h("td", null, column.unit), h("td", { class: "meaning" }, column.meaning));
  const main = one.columns.filter((column) => MAIN_COLUMNS.includes(column.name));
  const rest = one.columns.filter((column) => !MAIN_COLUMNS.includes(column.name));
  return [
    main.length ? section("Measurements", h("div", { class: "wide" }, h("table", { class: "values" }, h("tbody", null, main.map(line))))) : null,
    rest.length ? h("details", null, h("summary", null, `${rest.length} other values`), h("div", { class: "wide" }, h("table", { class: "values" }, h("tbody", null, rest.map(line))))) : null,
  ];
}

function provenance(one, note) {
  const facts = [
    ["schema of the survey", one.schema], ["service version", note.service_version], ["configuration", note.configuration],
    ["scored at", typeof note.scored_at === "number" ? `${new Date(note.scored_at).toISOString().slice(0, 19).replace("T", " ")} UTC` : null],
    ["seen before", note.duplicate === true ? "yes" : null], ["redriven", note.redriven ? `${number(note.redriven)} times` : null],
  ].filter(([, value]) => value);
  return h("footer", { class: "faint" }, facts.map(([name, value]) => `${name} ${shown(value)}`).join(" · "));
}

// ---- labels ----
const labelKeys = () => night.classes.map((name, i) => [i === 0 ? "r" : i === 1 ? "b" : String(i - 1), name]);

function labelBar(one) {
  if (!night.labels) return h("p", { class: "faint" }, "Labels are not recorded: start the command with --labels FILE.");
  const note = h("input", { id: "note", type: "text", maxlength: night.max_note, placeholder: "note", "aria-label": "Note", autocomplete: "off",
    onchange: (event) => setLabel({ note: event.target.value }, false) });
  note.value = one.note;
  return h("div", { class: "labels", role: "group", "aria-label": "Label of the alert" },
    labelKeys().map(([key, name]) => h("button", { type: "button", class: "label", "data-label": name, "aria-pressed": String(one.label === name), "aria-keyshortcuts": key,
      onclick: () => setLabel({ label: one.label === name ? "" : name }, false) }, name, h("kbd", null, key))),
    h("button", { type: "button", class: "label", "data-label": "interesting", "aria-pressed": String(one.interesting), "aria-keyshortcuts": "i",
      onclick: () => setLabel({ interesting: !alert.interesting }, false) }, "★ interesting", h("kbd", null, "i")),
    note,
    h("button", { type: "button", disabled: !history_.length, onclick: undo, "aria-keyshortcuts": "u" }, "Undo", h("kbd", null, "u")));
}

const labelOf = (one) => ({ id: one.id, label: one.label, interesting: one.interesting, note: one.note });

async function send(label) {
  const answer = await fetch("api/labels", { method: "POST", headers: { "content-type": "application/json", "x-watch-token": TOKEN }, body: JSON.stringify(label) });
  const content = await answer.json().catch(() => ({ error: `The label was not stored (status ${answer.status}): load the page again.` }));
  if (!answer.ok) throw new Error(content.error);
  for (const one of [...rows, ...(alert ? [alert] : [])]) {
    if (one.id === label.id) Object.assign(one, { label: content.label, interesting: content.interesting, note: content.note });
  }
  showCounts(content);
  const place = rows.findIndex((one) => one.id === label.id);
  if (place >= 0) {
    const item = find("list").children[place], focused = item.contains(document.activeElement);
    item.replaceWith(row(rows[place]));
    if (focused) find("list").children[place].querySelector("button").focus({ preventScroll: true });
  }
  markSelected();
}

// Sends the changed label of the alert in detail; `advance` goes to the next alert, if the person wants that.
async function setLabel(change, advance) {
  if (!night.labels) { say("Labels are not recorded: start the command with --labels FILE.", true); return; }
  if (!alert) return;
  const before = labelOf(alert), id = alert.id, name = alert.object;
  const done = await attempt(() => send({ ...before, ...change }));
  if (!done) return;
  showProblem(counts?.problem || "");
  history_.push(before);
  say(`${name}: ${"label" in change ? change.label || "no label" : "interesting" in change ? (change.interesting ? "interesting" : "not interesting") : "note stored"}`);
  if (advance && find("advance").checked && alert.id === id) { await move(1); }
  if (alert.id === id) redrawLabels();
}

function redrawLabels() {
  const focused = document.activeElement?.closest(".labels") ? document.activeElement.dataset.label || "note" : null;
  find("detail").querySelector(".labels")?.replaceWith(labelBar(alert));
  put(find("detail").querySelector(".tags"), tags(alert));
  if (focused) (focused === "note" ? find("note") : find("detail").querySelector(`[data-label="${focused}"]`))?.focus();
}

async function undo() {
  const before = history_.pop();
  if (!before) { say("There is nothing to undo."); return; }
  if (await attempt(() => send(before))) {
    await select(before.id);
    say("The last label was undone.");
  } else history_.push(before);
}

// ---- counts ----
function showCounts(now) {
  counts = now;
  const parts = [`${plural(now.kept, "alert")}${now.reading ? ", reading" : ""}`];
  if (night?.labels) parts.push(`${now.labelled.toLocaleString("en")} labelled`);
  if (now.dropped) parts.push(`${plural(now.dropped, "older alert")} dropped (only the newest ${now.keep.toLocaleString("en")} are kept)`);
  const unreadable = Object.entries(now.unreadable);
  if (unreadable.length) parts.push(`${plural(unreadable.reduce((sum, [, count]) => sum + count, 0), "packet")} unreadable (${unreadable.map(([reason]) => shown(reason).replaceAll("_", " ")).join(", ")})`);
  find("status").textContent = parts.join(" · ");
  showProblem(now.problem ? `Reading: ${shown(now.problem)}` : "");
  const fresh = until === null ? 0 : now.newest - until;
  find("new").hidden = fresh <= 0;
  find("new").textContent = `${fresh.toLocaleString("en")} new`;
  find("new").setAttribute("aria-keyshortcuts", ".");
}

function listen() {
  const events = new EventSource("api/events");
  events.addEventListener("message", async (event) => {
    const now = JSON.parse(event.data);
    if (now.newest && !until) await showNew();
    else showCounts(now);
  });
  events.addEventListener("error", () => showProblem("The server does not answer: is the command still running?"));
}

async function showNew() {
  await loadNight();
  await loadList(0, true);
  if (!alert && rows.length) await select(rows[0].id);
}

// ---- controls ----
function options(select, choices, keep = true) {
  const before = select.value;
  put(select, choices.map(([value, name]) => h("option", { value }, name)));
  if (keep && choices.some(([value]) => value === before)) select.value = before;
}

async function loadNight() {
  await attempt(async () => {
    const first = night === null;
    night = await get("api/night");
    options(find("sort"), [
      ...(night.listed ? [["listed", "the list's order"]] : []), ["newest", "newest first"], ["strangest", "strangest first"], ["arrival", "last arrived first"],
      ...night.scores.flatMap((name) => [[name, `highest ${shown(name)}`], [`-${name}`, `lowest ${shown(name)}`]]),
    ]);
    if (first) find("sort").value = night.sort;
    options(find("label"), [["", "all"], ["none", "not labelled"], ["any", "labelled"], ["interesting", "interesting"], ...night.classes.map((name) => [name, name])]);
    options(find("survey"), [["", "all"], ...night.surveys.map((name) => [name, name.toUpperCase()])]);
    options(find("passed"), [["", "all"], ...night.filters.map((name) => [name, `passed ${shown(name)}`])]);
    options(find("score"), [["anomaly", "anomaly"], ...night.scores.map((name) => [name, shown(name)])]);
    find("survey-field").hidden = night.surveys.length < 2;
    find("passed-field").hidden = !night.filters.length;
    drawHelp();
  });
}

function drawHelp() {
  const keys = [
    ["j, ↓", "next alert"], ["k, ↑", "previous alert"], ["], [", "next and previous page of the list"],
    ...(night.labels ? [...labelKeys().map(([key, name]) => [key, `label: ${name}`]), ["i", "interesting, or not"], ["0", "remove the label"], ["n", "write a note"], ["u", "undo the last label"]] : []),
    [".", "show the new alerts"], ["m", "magnitude or flux"], ["v", "cutouts black on white"], ["/", "search"], ["Esc", "back to the list"], ["?", "this help"],
  ];
  put(find("keys"), keys.map(([key, what]) => h("div", null, h("dt", null, h("kbd", null, key)), h("dd", null, what))));
}

function back() {
  document.body.classList.remove("reading");
  find("list").querySelector("[aria-current]")?.focus();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || find("help").open) return;
  const typing = event.target.closest("input:not([type=checkbox]), select, textarea");
  if (event.key === "Escape") { if (typing) event.target.blur(); else back(); return; }
  if (typing) return;
  const label = night?.labels && labelKeys().find(([key]) => key === event.key);
  const actions = {
    j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
    "]": () => find("next").click(), "[": () => find("previous").click(), ".": () => showNew(), u: undo,
    i: () => alert && setLabel({ interesting: !alert.interesting }, false), 0: () => setLabel({ label: "" }, false),
    n: () => find("note")?.focus(), "/": () => { document.body.classList.remove("reading"); find("text").focus(); },
    m: () => { unit = unit === "magnitude" ? "flux" : "magnitude"; if (alert) drawDetail(); },
    v: () => { inverted = !inverted; if (alert) drawDetail(); }, "?": () => find("help").showModal(),
  };
  const action = label ? () => setLabel({ label: label[1] }, true) : Object.hasOwn(actions, event.key) ? actions[event.key] : null;
  if (action) { event.preventDefault(); action(); }
}

async function start() {
  find("filters").addEventListener("submit", (event) => event.preventDefault());
  let pause = 0;
  find("filters").addEventListener("input", (event) => {
    clearTimeout(pause);
    pause = setTimeout(() => loadList(0), event.target.matches("select") ? 0 : TYPING_PAUSE_MS);
  });
  find("previous").addEventListener("click", () => loadList(pageOfList - 1));
  find("next").addEventListener("click", () => loadList(pageOfList + 1));
  find("new").addEventListener("click", showNew);
  find("help-button").addEventListener("click", () => find("help").showModal());
  find("help-close").addEventListener("click", () => find("help").close());
  document.addEventListener("keydown", onKey);
  let width = 0;
  new ResizeObserver(() => { // the light curve is drawn for the width of the page
    const now = find("detail").clientWidth;
    if (alert && width && now && now !== width && !find("detail").contains(document.activeElement)) drawDetail();
    width = now || width;
  }).observe(find("detail"));
  await loadNight();
  await loadList(0, true);
  const wanted = window.location.hash.slice(1);
  if (/^[0-9]+$/.test(wanted)) await select(wanted);
  else if (rows.length) await select(rows[0].id);
  listen();
}

start();
