"use strict";
// Builds the cards from the JSON block. Text of models goes into text nodes and attributes only, never into markup.

const data = JSON.parse(document.getElementById("data").textContent);
const LEVELS = 10; // steps of colour on either side of the neutral value
const byId = (id) => document.getElementById(id);

// ---------------------------------------------------------------------------------------------------- columns

// Little-endian, as all machines with a browser are.
const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer;
const floats = (text) => new Float32Array(bytes(text));
const integers = (text) => new Int32Array(bytes(text));

/** Give every position the value of its run. */
function spread(values, lengths, total) {
  const column = new values.constructor(total);
  let start = 0;
  lengths.forEach((length, run) => column.fill(values[run], start, (start += length)));
  return column;
}

/** Unpack a rollout's columns: in full, or one value for each run of a segment. */
function unpack(rollout) {
  const total = rollout.texts.length;
  const lengths = integers(rollout.runs);
  const values = {};
  data.quantities.forEach(({ name }) => {
    const packed = rollout.values[name];
    values[name] = packed.runs === undefined ? floats(packed) : spread(floats(packed.runs), lengths, total);
  });
  return { ids: integers(rollout.ids), runs: lengths, segments: spread(integers(rollout.segments), lengths, total), values };
}

// ------------------------------------------------------------------------------------------------------- text

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const PLAIN = /^[!-~]+$/;
// Control, format (bidi too), lone surrogate, private, line separators.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/u;
const PARTS = /[ \t\n]|[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]|[^ \p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]+/gu;
const MARKS = { " ": "s", "\t": "tab", "\n": "n" };
const codePoint = (char) => "U+" + char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

/** Put text into an element with whitespace marked and invisible characters named. */
function fill(parent, text) {
  if (PLAIN.test(text)) {
    parent.textContent = text;
    return;
  }
  for (const part of text.match(PARTS) || []) {
    if (MARKS[part]) parent.append(element("span", MARKS[part], part));
    else if (HIDDEN.test(part)) parent.append(element("span", "code", codePoint(part)));
    else parent.append(part);
  }
}

/** Text for the panel and for screen readers, where whitespace has to be said. */
const sayChar = (char) => ({ "\n": "↵", "\t": "⇥" })[char] || `⟨${codePoint(char)}⟩`;
const said = (text) => text.replace(new RegExp(HIDDEN, "gu"), sayChar) || "piece of a character";

function number(value, digits = 5) {
  if (!Number.isFinite(value)) return String(value).replace("-", "−").replace("Infinity", "∞");
  const size = Math.abs(value);
  const far = size !== 0 && (size < 1e-3 || size >= 1e5);
  return String(far ? value.toExponential(digits - 2) : Number(value.toPrecision(digits))).replaceAll("-", "−");
}

/** Numbers with as many digits as it takes to tell them apart, 3 at least. */
function apart(values) {
  const distinct = (texts) => new Set(texts).size;
  let digits = 3;
  while (digits < 17 && distinct(values.map((value) => number(value, digits))) < distinct(values)) digits += 1;
  return values.map((value) => number(value, digits));
}

const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
const withUnit = (value, quantity) => number(value) + (quantity.unit ? " " + quantity.unit : "");

// ------------------------------------------------------------------------------------------------------ cards

let chosen = data.quantities[0];
const cards = [];
let marked = true; // whether strokes show where segments begin

/** Where (nearly) every segment is one token, a stroke at each says nothing; the legend says it instead. */
function markSegments() {
  const lengths = cards.flatMap(({ rollout, runs }) => {
    const labels = integers(rollout.segments);
    return [...runs].filter((_, run) => labels[run] >= 0);
  });
  const single = lengths.filter((length) => length === 1).length;
  marked = single < 0.9 * lengths.length;
  if (marked || !lengths.length) return;
  byId("edges").textContent = `no strokes: ${single === lengths.length ? "each" : "nearly each"} token is a segment of its own`;
}

function fact(parent, name, value, className) {
  const item = element("span", className, name + " ");
  item.append(element("b", "", value));
  parent.append(item);
}

function textBlock(card, title, text, open) {
  const block = element("details", "text");
  block.open = open;
  block.append(element("summary", "", title));
  const body = element("pre");
  fill(body, text);
  block.append(body);
  card.append(block);
}

function makeCard(rollout, index) {
  const card = element("section", "card");
  const top = element("div", "top");
  const title = element("h2", "", `Rollout ${rollout.id}`);
  title.id = `rollout-${index}`;
  title.title = "the number counts the rollouts of the run, from 0";
  card.setAttribute("aria-labelledby", title.id);
  top.append(title);
  const verdicts = { true: ["✓ correct", "correct"], false: ["✗ wrong", "wrong"], null: ["unchecked", ""] };
  fact(top, "answer", ...verdicts[rollout.correct]);
  if (rollout.demonstration) fact(top, "response", "from the data");
  fact(top, "mean abs(drift)", rollout.mean_drift);
  fact(top, "drift rank", `${rollout.rank + 1} of ${rollout.num_ranked}`);
  fact(top, "stopped by", rollout.stop);
  fact(top, "age", counted(rollout.age, "step"));
  fact(top, "reuse epoch", String(rollout.reuse_epoch));
  fact(top, "length", counted(rollout.texts.length, "token"));
  card.append(top);
  textBlock(card, "prompt", rollout.prompt, rollout.prompt.length < 1500);
  const { gold, teacher_prompt: seen } = rollout;
  if (seen !== null) textBlock(card, "prompt that the teacher sees", seen, false);
  if (gold !== null && gold.length < 100 && PLAIN.test(gold)) fact(top, "gold answer", gold);
  else if (gold !== null) textBlock(card, "gold answer", gold, true);
  const strip = element("canvas", "strip");
  Object.assign(strip, { ariaHidden: "true", title: "the quantity along the response; click to go there" });
  const tokens = element("div", "tokens");
  const label = `response of rollout ${rollout.id}, token by token`;
  Object.assign(tokens, { role: "listbox", ariaLabel: label, translate: false });
  card.append(strip, tokens);
  byId("rollouts").append(card);
  const made = { rollout, strip, tokens, spans: [], current: 0, ...unpack(rollout) };
  strip.addEventListener("click", (event) => {
    const share = event.offsetX / strip.clientWidth;
    focusToken(made, Math.min(Math.floor(share * rollout.texts.length), rollout.texts.length - 1));
  });
  cards.push(made);
}

/** Make the spans of a response, a block for each line. */
function buildTokens(card) {
  const { rollout, segments } = card;
  const special = new Set(rollout.special);
  const numbered = card.runs.length * 8 < rollout.texts.length; // short segments are not numbered
  const fragment = document.createDocumentFragment();
  const blank = Object.assign(element("span"), { tabIndex: -1, role: "option" });
  let line = null;
  rollout.texts.forEach((text, index) => {
    if (!line) {
      line = Object.assign(element("div", "line"), { role: "presentation" });
      fragment.append(line);
    }
    const span = blank.cloneNode(false);
    span.place = [card, index];
    fill(span, text);
    span.fixed = "t"; // classes that do not depend on the quantity
    if (text === "") span.fixed += " piece";
    if (special.has(index)) span.fixed += " special";
    if (segments[index] < 0) span.fixed += " masked";
    else if (marked && (index === 0 || segments[index] !== segments[index - 1])) {
      span.fixed += " edge";
      if (numbered) span.dataset.segment = segments[index];
    }
    card.spans.push(span);
    line.append(span);
    if (text.endsWith("\n")) line = null;
  });
  card.tokens.append(fragment);
  if (card.spans.length) card.spans[0].tabIndex = 0;
  paint(card);
}

// ----------------------------------------------------------------------------------------------------- colour

/** Signed level of colour, -LEVELS to LEVELS; NaN where there is no number. */
function level(value, { low, neutral, high }) {
  const away = value - neutral;
  const reach = away > 0 ? high - neutral : neutral - low;
  if (Number.isNaN(value)) return NaN;
  if (reach <= 0) return Number.isFinite(away) ? 0 : Math.sign(away) * LEVELS;
  return Math.sign(away) * Math.min(LEVELS, Math.round((LEVELS * Math.abs(away)) / reach));
}

function levelClass(shade) {
  if (Number.isNaN(shade)) return " strange";
  return shade === 0 ? "" : ` l${Math.abs(shade)}${shade < 0 ? " below" : ""}`;
}

function paint(card) {
  const values = card.values[chosen.name];
  card.spans.forEach((span, index) => {
    span.className = card.segments[index] < 0 ? span.fixed : span.fixed + levelClass(level(values[index], chosen));
  });
  drawStrip(card);
}

/** The quantity along the response: in each pixel column the value that is farthest from the neutral one. */
function drawStrip(card) {
  const { strip, segments } = card;
  const values = card.values[chosen.name];
  const width = (strip.width = strip.clientWidth * devicePixelRatio);
  const height = (strip.height = strip.clientHeight * devicePixelRatio);
  const context = strip.getContext("2d");
  const [down, up] = [chosen.low < chosen.neutral, chosen.high > chosen.neutral];
  const room = down && up ? height / 2 : height;
  const middle = up ? room : 0; // where the neutral value lies; bars go up and down from there
  const shades = { true: resolved("--bar-below"), false: resolved("--bar-above") };
  context.fillStyle = resolved("--line");
  context.fillRect(0, Math.min(middle, height - 1), width, 1);
  const farthest = new Map();
  values.forEach((value, index) => {
    const column = Math.floor((index * width) / values.length);
    const shade = segments[index] < 0 ? 0 : level(value, chosen) || 0;
    if (Math.abs(shade) >= Math.abs(farthest.get(column) || 0)) farthest.set(column, shade);
  });
  const breadth = Math.max(Math.ceil(width / values.length), 1);
  for (const [column, shade] of farthest) {
    const tall = (Math.abs(shade) / LEVELS) * room;
    context.fillStyle = shades[shade < 0];
    context.fillRect(column, shade < 0 ? middle : middle - tall, breadth, tall);
  }
}

/** A colour of the theme, as a canvas understands it. */
function resolved(name) {
  const probe = byId("live");
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

function showScale() {
  const scale = byId("scale");
  const { low, neutral, high, below, above } = chosen;
  scale.replaceChildren();
  const boxes = element("i");
  for (let shade = low < neutral ? -LEVELS : 0; shade <= (high > neutral ? LEVELS : 0); shade += 2)
    boxes.append(element("b", "t" + levelClass(shade), "a"));
  const [from, middle, to] = apart([low, neutral, high]);
  const ends = [(below ? "≤ " : "") + from, (above ? "≥ " : "") + to];
  if (low === high) scale.append(boxes, `${below || above ? "all finite values" : "all"} ${withUnit(neutral, chosen)}`);
  else scale.append(ends[0], boxes, `${ends[1]} ${chosen.unit}`);
  if (low < neutral && neutral < high) scale.append(element("span", "meaning", `uncoloured: ${middle}`));
  scale.ariaLabel = `colours of ${chosen.label} from ${ends[0]} to ${ends[1]} ${chosen.unit}, none at ${middle}`;
  byId("meaning").textContent = chosen.meaning;
}

// ---------------------------------------------------------------------------------------- details and keyboard

function describe(card, index) {
  const values = data.quantities.map((quantity) => [quantity, card.values[quantity.name][index]]);
  const masked = card.segments[index] < 0;
  const place = `token ${index + 1} of ${card.spans.length}, ${masked ? "not in the loss" : `segment ${card.segments[index]}`}`;
  return { values, masked, place, text: said(card.rollout.texts[index]) };
}

function showDetails(card, index) {
  const { values, masked, place, text } = describe(card, index);
  const table = element("table");
  for (const [quantity, value] of values) {
    const row = element("tr", quantity === chosen ? "chosen" : "");
    const name = element("th", "", quantity.label);
    name.scope = "row";
    row.append(name, element("td", "", masked ? "–" : withUnit(value, quantity)));
    row.title = quantity.meaning;
    table.append(row);
  }
  const where = element("p", "", `${place} · id ${card.ids[index]}`);
  byId("details").replaceChildren(element("h2", "", `“${text}”`), where, table);
}

function focusToken(card, index) {
  const span = card.spans[index];
  if (!span) return;
  card.spans[card.current].tabIndex = -1; // one tab stop for a response, wherever the reader was last
  card.current = index;
  span.tabIndex = 0;
  span.focus();
  span.scrollIntoView({ block: "nearest" });
}

/** The nearest position after (or before) this one for which `wanted` holds, or this one. */
function seek(card, from, step, wanted) {
  for (let index = from + step; index >= 0 && index < card.spans.length; index += step) if (wanted(index)) return index;
  return from;
}

function target(card, index, event) {
  const begins = (at) => at === 0 || card.segments[at] !== card.segments[at - 1];
  const strongest = (at) => card.segments[at] >= 0 && Math.abs(level(card.values[chosen.name][at], chosen)) === LEVELS;
  const moves = {
    ArrowLeft: () => index - 1,
    ArrowRight: () => index + 1,
    ArrowUp: () => seek(card, index, -1, begins),
    ArrowDown: () => seek(card, index, 1, begins),
    Home: () => 0,
    End: () => card.spans.length - 1,
    e: () => seek(card, index, 1, strongest),
    E: () => seek(card, index, -1, strongest),
  };
  return moves[event.key]?.();
}

function listen() {
  const main = byId("rollouts");
  const place = (event) => event.target.closest?.(".t")?.place;
  let pointed = null;
  const point = (span) => {
    pointed?.classList.remove("pointed");
    pointed = span;
    pointed?.classList.add("pointed");
  };
  main.addEventListener("mouseover", (event) => {
    const found = place(event);
    point(found ? found[0].spans[found[1]] : null);
    if (found) showDetails(...found);
  });
  main.addEventListener("mouseleave", () => point(null));
  main.addEventListener("click", (event) => place(event) && focusToken(...place(event)));
  main.addEventListener("focusin", (event) => {
    const found = place(event);
    if (!found) return;
    showDetails(...found);
    const { values, masked, place: where, text } = describe(...found);
    values.sort(([one], [other]) => (other === chosen) - (one === chosen)); // the chosen quantity is said first
    const spoken = masked ? [] : values.map(([quantity, value]) => `${quantity.label} ${withUnit(value, quantity)}`);
    event.target.ariaLabel = text === " " ? "space" : text;
    byId("live").textContent = [where, ...spoken].join(", ");
  });
  main.addEventListener("keydown", (event) => {
    const found = place(event);
    if (!found || event.ctrlKey || event.metaKey || event.altKey) return;
    const next = target(...found, event);
    if (next === undefined) return;
    event.preventDefault();
    focusToken(found[0], next);
  });
}

// ---------------------------------------------------------------------------------------------- choices, start

function choose(name) {
  chosen = data.quantities.find((quantity) => quantity.name === name) || data.quantities[0];
  byId("quantity").value = chosen.name;
  showScale();
  cards.forEach(paint);
  const focused = document.activeElement?.place;
  if (focused) showDetails(...focused);
  for (const side of ["prev", "next"]) {
    const link = document.querySelector(`link[rel="${side}"]`);
    if (link) byId(side).href = link.getAttribute("href") + "#" + encodeURIComponent(chosen.name); // the choice goes along
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `theme: ${theme}`;
  cards.forEach(drawStrip);
}

/** Read or write what is kept between pages; a browser may keep nothing for files. */
function remembered(value) {
  try {
    if (value) localStorage.setItem("opdlab-theme", value);
    return localStorage.getItem("opdlab-theme");
  } catch { return null; }
}

function start() {
  for (const quantity of data.quantities) {
    const option = element("option", "", quantity.label + (quantity.unit ? ` (${quantity.unit})` : ""));
    option.value = quantity.name;
    byId("quantity").append(option);
  }
  byId("quantity").addEventListener("change", (event) => {
    history.replaceState(null, "", "#" + encodeURIComponent(event.target.value));
    choose(event.target.value);
  });
  const themes = ["auto", "light", "dark"];
  byId("theme").addEventListener("click", () => {
    setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]);
    remembered(document.documentElement.dataset.theme);
  });
  setTheme(themes.find((theme) => theme === remembered()) || "auto");
  data.rollouts.forEach(makeCard);
  markSegments();
  // Compared as it stands: what somebody typed there may not be decodable.
  choose(data.quantities.find(({ name }) => encodeURIComponent(name) === location.hash.slice(1))?.name);
  listen();
  const redraw = () => cards.forEach(drawStrip);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("resize", redraw);
  // The first card at once, the others as the browser finds time, so that a page of long responses answers soon.
  const waiting = [...cards];
  const build = () => {
    buildTokens(waiting.shift());
    if (waiting.length) setTimeout(build);
    else document.documentElement.dataset.ready = "";
  };
  if (waiting.length) build();
}

start();
