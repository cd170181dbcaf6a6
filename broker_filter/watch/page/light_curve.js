// Draws a light curve as SVG: magnitude or difference flux against the days from the alert.
import { h, s, put, number } from "./dom.js";

const WIDEST = 760, NARROWEST = 330, HEIGHT = 300, LEFT = 62, RIGHT = 14, TOP = 12, BOTTOM = 42;
const ZERO_POINT = 31.4; // AB magnitude of 1 nJy
const LIMIT_SIGMAS = 5; // an upper limit is drawn at this many times its uncertainty
const DETECTED_SIGMAS = 3; // forced photometry below it is drawn as an upper limit among magnitudes
const LEAST_RANGE = 0.4; // magnitudes that an axis shows at least, so that noise does not look like a change
const MAGNITUDE_ERROR = 2.5 / Math.LN10;
const PER_UJY = 1000; // nJy
const BANDS = ["u", "g", "r", "i", "z", "y"];

const magnitude = (flux) => ZERO_POINT - 2.5 * Math.log10(flux);

// What is drawn of each point: {day, band, mark, y, low, high, says}, or null.
function asMagnitude(point) {
  const flux = point.flux, error = point.error;
  const isLimit = point.kind === "limit" || (point.kind === "forced" && !(Math.abs(flux) >= DETECTED_SIGMAS * error));
  if (isLimit) {
    if (!(error > 0)) return null;
    const y = magnitude(LIMIT_SIGMAS * error);
    return { mark: "limit", y, low: y, high: y, says: `fainter than ${y.toFixed(2)} mag (${LIMIT_SIGMAS} sigma)` };
  }
  if (!flux) return null;
  const y = magnitude(Math.abs(flux)), half = error > 0 ? MAGNITUDE_ERROR * error / Math.abs(flux) : 0;
  const mark = point.kind;
  const sense = flux < 0 ? ", fainter than in the template" : "";
  return { mark, negative: flux < 0, y, low: y - half, high: y + half, says: `${y.toFixed(2)} ± ${half.toFixed(2)} mag${sense}` };
}

function asFlux(point) {
  const error = point.error > 0 ? point.error / PER_UJY : 0;
  if (point.kind === "limit") {
    const y = LIMIT_SIGMAS * error;
    return error ? { mark: "limit", y, low: y, high: y, says: `below ${number(y)} µJy (${LIMIT_SIGMAS} sigma)` } : null;
  }
  if (point.flux === null) return null;
  const y = point.flux / PER_UJY;
  return { mark: point.kind, y, low: y - error, high: y + error, says: `${number(y)} ± ${number(error)} µJy` };
}

function ticks(low, high, about) {
  const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough) || 10 * power;
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9)), found = [];
  for (let k = Math.ceil(low / step); k * step <= high + 1e-9 * step; k += 1) {
    found.push({ value: k * step, text: (k * step).toFixed(digits).replace(/^-(0(\.0*)?)$/, "$1") });
  }
  return found;
}

const KINDS = { detection: "detection", forced: "forced photometry", limit: "upper limit" };

function marker(one, x, y) {
  const about = { class: `mark ${one.mark} band-${one.band}${one.negative ? " negative" : ""}` };
  const minus = one.negative ? s("line", { class: `minus band-${one.band}`, x1: x - 2, x2: x + 2, y1: y, y2: y }) : null;
  return [shape(one.mark, about, x, y), minus];
}

function shape(mark, about, x, y) {
  switch (mark) {
    case "limit": return s("path", { ...about, d: `M${x - 4.5},${y - 3}h9l-4.5,7z` });
    case "forced": return s("rect", { ...about, x: x - 3.2, y: y - 3.2, width: 6.4, height: 6.4 });
    default: return s("circle", { ...about, cx: x, cy: y, r: 4.4 });
  }
}

function draw(points, mjd, unit, WIDTH) {
  const drawn = points.flatMap((point) => {
    const one = unit === "magnitude" ? asMagnitude(point) : asFlux(point);
    return one && Number.isFinite(one.y) ? [{ ...one, day: point.mjd - mjd, band: BANDS.includes(point.band) ? point.band : "unknown", point }] : [];
  });
  if (!drawn.length) return h("p", { class: "faint" }, "The packet holds no point that can be drawn in this unit.");
  const days = drawn.map((one) => one.day);
  let first = Math.min(...days, 0), last = Math.max(...days, 0);
  const roomX = 0.03 * (last - first) || 1;
  first -= roomX; last += roomX;
  // Detections set the range, so that an outlier of the forced photometry cannot compress it.
  const leading = drawn.filter((one) => one.mark === "detection" || (unit === "magnitude" && one.mark === "limit" && one.point.kind === "limit"));
  const framing = leading.length ? leading : drawn;
  let low = Math.min(...framing.map((one) => one.low)), high = Math.max(...framing.map((one) => one.high));
  if (unit === "flux") { low = Math.min(low, 0); high = Math.max(high, 0); }
  if (unit === "magnitude" && high - low < LEAST_RANGE) [low, high] = [(low + high - LEAST_RANGE) / 2, (low + high + LEAST_RANGE) / 2];
  const roomY = (unit === "flux" ? 0.18 : 0.1) * (high - low) || 0.5;
  low -= roomY; high += roomY;
  const x = (day) => LEFT + (day - first) / (last - first) * (WIDTH - LEFT - RIGHT);
  const share = (value) => (value - low) / (high - low);
  const y = (value) => TOP + (unit === "magnitude" ? share(value) : 1 - share(value)) * (HEIGHT - TOP - BOTTOM);
  const clip = s("clipPath", { id: "plot" }, s("rect", { x: LEFT, y: TOP, width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM }));
  const marks = drawn.map((one) => s("g", { class: "point" },
    s("title", null, `${one.point.band} ${KINDS[one.mark]}: ${one.says}; ${one.day.toFixed(3)} days, MJD ${one.point.mjd.toFixed(4)}`),
    one.high > one.low ? s("line", { class: `error band-${one.band}`, x1: x(one.day), x2: x(one.day), y1: y(one.low), y2: y(one.high) }) : null,
    marker(one, x(one.day), y(one.y))));
  const outside = drawn.filter((one) => one.y < low || one.y > high).length;
  const drawing = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `Light curve with ${drawn.length} points; the table below has the values.` },
    s("defs", null, clip),
    ticks(low, high, 5).map(({ value, text }) => [
      s("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      s("text", { x: LEFT - 7, y: y(value) + 4, "text-anchor": "end" }, text),
    ]),
    ticks(first, last, WIDTH / 90).map(({ value, text }) => [
      s("line", { class: "grid", x1: x(value), x2: x(value), y1: TOP, y2: HEIGHT - BOTTOM }),
      s("text", { x: x(value), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, text),
    ]),
    s("line", { class: "now", x1: x(0), x2: x(0), y1: TOP, y2: HEIGHT - BOTTOM }),
    unit === "flux" ? s("line", { class: "zero", x1: LEFT, x2: WIDTH - RIGHT, y1: y(0), y2: y(0) }) : null,
    s("g", { "clip-path": "url(#plot)" }, marks),
    s("rect", { class: "frame", x: LEFT, y: TOP, width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM }),
    s("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, "days from the alert"),
    s("text", { transform: `translate(14 ${(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)`, "text-anchor": "middle" },
      unit === "magnitude" ? "magnitude of the difference (AB)" : "difference flux (µJy)"));
  return [drawing, legend(drawn, outside)];
}

function legend(drawn, outside) {
  const bands = [...BANDS, "unknown"].filter((band) => drawn.some((one) => one.band === band));
  const marks = Object.keys(KINDS).filter((mark) => drawn.some((one) => one.mark === mark));
  const key = (one) => s("svg", { viewBox: "0 0 14 14", class: "key", "aria-hidden": "true" }, marker(one, 7, 7));
  return h("p", { class: "legend" },
    bands.map((band) => h("span", null, key({ mark: "detection", band }), band === "unknown" ? "unknown band" : band)),
    marks.map((mark) => h("span", null, key({ mark, band: "any" }), KINDS[mark])),
    drawn.some((one) => one.negative) ? h("span", null, key({ mark: "detection", band: "any", negative: true }), "fainter than in the template") : null,
    outside ? h("span", { class: "faint" }, `${outside} outside the range`) : null);
}

function table(points, mjd) {
  const names = { limit: "upper limit" };
  return h("details", null, h("summary", null, points.length === 1 ? "The point as a table" : `The ${points.length} points as a table`),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Points of the light curve" }, h("table", null,
      h("thead", null, h("tr", null, ["days", "MJD", "band", "kind", "flux (µJy)", "± 1 sigma"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, points.map((point) => h("tr", null,
        h("td", null, (point.mjd - mjd).toFixed(3)), h("td", null, point.mjd.toFixed(5)), h("td", null, point.band),
        h("td", null, names[point.kind] || point.kind),
        h("td", null, point.kind === "limit" ? "–" : number(point.flux / PER_UJY)),
        h("td", null, point.error === null ? "–" : number(point.error / PER_UJY))))))));
}

// Returns the section of the light curve for a page of this width in pixels; `unit` is "magnitude" or "flux", and `choose`
// is called with another one.
export function lightCurve(alert, unit, width, choose) {
  const points = alert.light_curve;
  if (!points.length) return null;
  const option = (value, name) => h("button", { type: "button", "aria-pressed": String(unit === value), "data-unit": value, onclick: () => choose(value) }, name);
  return h("section", { class: "light-curve" },
    h("div", { class: "head" }, h("h3", null, "Light curve"),
      h("div", { class: "options", role: "group", "aria-label": "Unit of the light curve" }, option("magnitude", "magnitude"), option("flux", "flux"))),
    draw(points, alert.mjd, unit, Math.min(WIDEST, Math.max(NARROWEST, width || WIDEST))), table(points, alert.mjd));
}
