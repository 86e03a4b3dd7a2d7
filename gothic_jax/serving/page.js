// The page of gothic-serve: drafts, their branches, and what the model says of a text.
//
// A draft is a tree of changes. Each node says what it does to the text of its parent: at a place it
// removes so many characters and inserts others. So the text of a node is what the path from the root
// makes, and each of its pieces is known by the node that brought it: a person, or the model with a
// blend and a receipt. All places are UTF-16 offsets, as JavaScript and the server count them.
//
// Nothing that comes from a server, a file or the storage is ever parsed as HTML: see `element`.

const STORED = "gothic:draft:";
const OPEN_HERE = "gothic:open"; // of this tab
const FENCE = "\n\n```gothic-receipts\n";
const LARGEST_FILE = 8 * 2 ** 20;
const SETTINGS = ["max_tokens", "temperature", "top_k", "top_p", "seed", "copy_guard", "best_of"];
const MARKS = ["copied", "voices", "unread", "written"];
const COLOURS = 5;
const WEAK = 0.1; // nats a token; sentences that are less clearly in a voice are paler
const ENDED = "The model ends the text here.";
const LINE = 40; // pixels that a line of the text takes, and a little more
const FIRST_VOICES = ["wilde", "lovecraft"]; // where the model has them

const $ = (id) => document.getElementById(id);
const area = $("text");

const page = {
  model: null, // as /gothic/model describes it
  stale: false, // whether to ask for the model again
  draft: null,
  text: "", // of the draft's current node; the textarea has it, too, but for what is not recorded yet
  typing: null, // {id, base}: the node that further typing adds to, and its parent's text
  writing: null, // {controller}: the request whose text may still come
  measured: null, // what /gothic/measure said, moved along with later changes
  unmeasured: "", // why there is nothing measured
  choices: null, // the next words on show, and their place
  pointed: null, // the place in the text under the pointer
};

// ---- Texts and changes ----

const clean = (text) => text.replace(/\r\n?/g, "\n"); // as a textarea does it

/** The text without blanks at its end, as the model reads a prompt: its words begin with a blank. */
const withoutBlanks = (text) => text.replace(/[^\S\n]+$/, "");

const isHalf = (unit, from) => unit >= from && unit < from + 0x400; // of a surrogate pair

/**
 * The one change that makes `after` of `before`; it cuts no character in two. What was typed ends at
 * the caret: so a letter typed before the same letter is the first of the two.
 */
function difference(before, after, caret = after.length) {
  const shorter = Math.min(before.length, after.length);
  const most = Math.min(shorter, before.length - (after.length - caret));
  let at = 0;
  while (at < most && before.charCodeAt(at) === after.charCodeAt(at)) at += 1;
  if (at && isHalf(before.charCodeAt(at - 1), 0xd800)) at -= 1;
  let same = 0;
  while (
    same < shorter - at &&
    before.charCodeAt(before.length - 1 - same) === after.charCodeAt(after.length - 1 - same)
  ) {
    same += 1;
  }
  if (same && isHalf(before.charCodeAt(before.length - same), 0xdc00)) same -= 1;
  return {
    at,
    removed: before.length - at - same,
    inserted: after.slice(at, after.length - same),
  };
}

/** The same places after a change: those that it touched are gone. */
function moved(spans, { at, removed, inserted }) {
  const shift = inserted.length - removed;
  return spans.flatMap((span) => {
    if (span.end <= at) return [span];
    if (span.start < at + removed) return [];
    return [{ ...span, start: span.start + shift, end: span.end + shift }];
  });
}

function cut(pieces, from, to) {
  let place = 0;
  return pieces.flatMap((piece) => {
    const start = place;
    place += piece.text.length;
    const text = piece.text.slice(Math.max(0, from - start), Math.max(0, to - start));
    return text ? [{ ...piece, text }] : [];
  });
}

// ---- The tree ----

function newId() {
  // Not randomUUID: a browser has it only on https and this machine's own address.
  return `n${[...crypto.getRandomValues(new Uint32Array(3))].map((n) => n.toString(36)).join("")}`;
}

function newDraft(like) {
  const root = { id: "root", parent: null, kind: "root", at: 0, removed: 0, inserted: "" };
  return {
    id: newId(),
    changed: Date.now(),
    title: "",
    nodes: { root },
    current: "root",
    last: {}, // by node, the child that was visited last: where redo goes
    mix: like?.mix ? { ...like.mix } : null, // null until the model's voices are known
    settings: { ...like?.settings },
  };
}

function pathTo(draft, id) {
  const path = [];
  for (let node = draft.nodes[id]; node; node = draft.nodes[node.parent]) path.unshift(node);
  return path;
}

/** The text of a node as pieces, each with the node that brought it. */
function piecesOf(draft, id) {
  return pathTo(draft, id).reduce((pieces, node) => {
    const piece = node.inserted ? [{ text: node.inserted, node }] : [];
    return [...cut(pieces, 0, node.at), ...piece, ...cut(pieces, node.at + node.removed, Infinity)];
  }, []);
}

const currentNode = () => page.draft.nodes[page.draft.current];
const currentPieces = () => piecesOf(page.draft, page.draft.current);
const textOf = (draft, id) => piecesOf(draft, id).map((piece) => piece.text).join("");

function childrenOf(draft) {
  const children = {};
  for (const node of Object.values(draft.nodes)) (children[node.parent] ??= []).push(node);
  return children;
}

function visit(draft, id) {
  draft.current = id;
  for (const node of pathTo(draft, id)) if (node.parent) draft.last[node.parent] = node.id;
}

function add(draft, parent, change, facts) {
  const node = { id: newId(), parent, ...change, ...facts };
  draft.nodes[node.id] = node;
  visit(draft, node.id);
  unsaved.add(node.id);
  return node;
}

// ---- The storage ----

const unsaved = new Set(); // the nodes that this tab has changed since it last saved
const unstored = new Map(); // the drafts that the storage did not take, by id
let saveTimer = 0;

function saveSoon() {
  saveTimer ||= setTimeout(save, 400);
}

function save() {
  clearTimeout(saveTimer);
  saveTimer = 0;
  const { draft } = page;
  if (Object.keys(draft.nodes).length === 1) return; // nothing is in it
  draft.changed = Date.now();
  draft.title = page.text.trim().split("\n", 1)[0].slice(0, 60);
  try {
    adopt(readDraft(STORED + draft.id));
    localStorage.setItem(STORED + draft.id, JSON.stringify(draft));
    sessionStorage.setItem(OPEN_HERE, draft.id);
    unsaved.clear();
    unstored.delete(draft.id);
    if ($("alert").dataset.about === "storage") say("");
  } catch (error) {
    unstored.set(draft.id, draft);
    const why = error.name === "QuotaExceededError" ? "is full" : "cannot be used";
    const what = "This draft is lost when the page closes. Download it.";
    alarm(`This browser's storage ${why}. ${what}`, "storage");
  }
  listDrafts();
}

/** A draft from the storage, or null where there is none that can be read. */
function readDraft(key) {
  try {
    const draft = JSON.parse(localStorage.getItem(key));
    const isWhole = Object.values(draft.nodes).every(({ kind }) => Object.hasOwn(KINDS, kind));
    return isWhole && draft.nodes.root && draft.nodes[draft.current] ? draft : null;
  } catch {
    return null;
  }
}

/** Takes over what another tab has added to the draft that is open here. */
function adopt(stored) {
  if (!stored) return;
  const { nodes } = page.draft;
  for (const node of Object.values(stored.nodes)) {
    if (!unsaved.has(node.id)) nodes[node.id] = node;
  }
}

function allDrafts() {
  let stored = [];
  try {
    const keys = Object.keys(localStorage).filter((key) => key.startsWith(STORED));
    stored = keys.map(readDraft).filter((draft) => draft && !unstored.has(draft.id));
  } catch {
    // There is no storage; `save` says so.
  }
  return [...unstored.values(), ...stored].sort((one, other) => other.changed - one.changed);
}

function listDrafts() {
  const others = allDrafts().filter((draft) => draft.id !== page.draft.id);
  const rows = [page.draft, ...others].map(({ id, title }) => [id, title || "Empty draft"]);
  fill($("drafts"), rows, () => rows.map(([value, text]) => element("option", { value }, text)));
  $("drafts").value = page.draft.id;
}

// ---- The server ----

async function ask(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      signal,
      ...(body && {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
      }),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is gothic-serve running?");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const message = answer?.error?.message ?? `The server answered with status ${response.status}.`;
  throw Object.assign(new Error(message), { busy: [429, 503].includes(response.status) });
}

/** The objects of a stream of events; raises an error where it ends before its last one. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Error("The server broke off. What came is kept.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function loadModel() {
  const model = await (await ask("/gothic/model")).json();
  page.model = model;
  for (const name of ["temperature", "top_k", "top_p"]) $(name).defaultValue = model.sampling[name];
  $("copy_guard").defaultValue = model.copy_guard ?? "";
  $("max_tokens").max = model.max_tokens;
  $("best_of").max = model.max_n;
  for (const id of ["guard", "best"]) $(id).hidden = !model.copied; // they need the index
  const { name, iteration, context } = model;
  $("model").textContent = `${name}, iteration ${iteration}; it reads ${context} tokens.`;
  openDraft(page.draft);
}

/** The end of a text that the model can read at all; so a receipt stays short. */
function promptOf(text) {
  const start = text.length - page.model.context * 12;
  return withoutBlanks(start > 0 ? text.slice(start).replace(/^\S*\s+/, "") : text);
}

// ---- What the person sees ----

/** An element with text; the only way in which the page makes one. */
function element(name, properties = {}, ...content) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key.includes("-") || key === "scope") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...content.filter((part) => part !== null));
  return made;
}

const button = (onclick, properties, ...content) =>
  element("button", { type: "button", onclick, ...properties }, ...content);
const item = (...content) => element("li", {}, ...content);

/** Fills an element anew, but only where what it shows has changed: so the focus stays. */
function fill(parent, facts, make) {
  const shown = JSON.stringify(facts);
  if (parent.shown === shown) return false;
  parent.shown = shown;
  parent.replaceChildren(...make());
  return true;
}

function say(message) {
  $("status").textContent = message;
  $("alert").textContent = "";
}

function alarm(message, about = "") {
  $("alert").textContent = message;
  $("alert").dataset.about = about;
  $("status").textContent = "";
}

const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 2 });
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
const words = (text) => text.split(/\s+/).filter(Boolean).length;
const named = (voice) => voice.replace(/(?:^|_)(.)/g, (_, letter) => ` ${letter.toUpperCase()}`).trim();
const short = (text, most = 48) => {
  const line = [...text.trim().replace(/\s+/g, " ")];
  return line.length > most ? `${line.slice(0, most).join("")}\u2026` : line.join("");
};

function blendName(blend = {}) {
  const parts = Object.entries(blend);
  if (!parts.length) return "no voice";
  if (parts.length === 1 && parts[0][1] === 1) return named(parts[0][0]);
  return parts.map(([voice, weight]) => `${named(voice)} ${number(weight)}`).join(", ");
}

/** The voices whose sentences are told apart: those of the mix, with others to make up two. */
function compared() {
  return withOthers(mixed(), page.model?.voices ?? mixed());
}

function withOthers(voices, known) {
  return [...new Set([...voices, ...FIRST_VOICES, ...known])]
    .filter((voice) => known.includes(voice))
    .slice(0, Math.max(2, voices.length));
}

const mixed = () => Object.keys(page.draft.mix ?? {});
const colourOf = (voice) => {
  const index = compared().indexOf(voice);
  return index < 0 ? "" : `voice${(index % COLOURS) + 1}`;
};
const dot = (voice) => element("span", { className: `dot ${colourOf(voice)}`, "aria-hidden": "true" });

/** Puts a text into the textarea; the caret and the marks stay with their words. */
function setText(text) {
  const change = difference(area.value, text);
  area.setRangeText(change.inserted, change.at, change.at + change.removed, "preserve");
  page.text = text;
  moveMarks(change);
  layMarks();
}

/** The layer under the textarea gets its text at once, since it gives the height. */
function layMarks() {
  const shown = `${area.value}\n`; // without the line end, an empty last line would have no height
  const marks = $("marks");
  if (marks.firstChild) marks.firstChild.data = shown;
  else marks.append(shown);
}

function moveMarks(change) {
  const { measured } = page;
  if (!measured || !(change.removed || change.inserted)) return;
  const { copied } = measured;
  page.measured = {
    ...measured,
    read_from: Math.min(measured.read_from, change.at),
    copied: copied && { ...copied, spans: moved(copied.spans, change) },
    sentences: measured.sentences && moved(measured.sentences, change),
  };
}

let painting = 0;

function paintSoon() {
  painting ||= requestAnimationFrame(paint);
}

function paint() {
  painting = 0;
  layMarks();
  paintMarks();
  paintHere();
  paintBranches();
  paintMix();
  if (page.model) paintMeasures();
  const node = currentNode();
  const writing = page.writing !== null;
  $("continue").textContent = writing ? "Stop" : "Continue";
  for (const id of ["another", "best", "next"]) $(id).disabled = writing;
  $("another").disabled ||= node.kind !== "written";
  $("undo").disabled = node.parent === null;
  $("redo").disabled = !page.draft.last[node.id];
  $("best").textContent = `Best of ${setting("best_of") ?? 8}`;
}

function paintMarks() {
  const on = Object.fromEntries(MARKS.map((mark) => [mark, $(`mark-${mark}`).checked]));
  const ranges = {};
  const mark = (name, start, end) => (ranges[name] ??= []).push([start, end]);
  const { measured } = page;
  for (const { start, end, voice, strength } of (on.voices && measured?.sentences) || []) {
    if (colourOf(voice)) mark(colourOf(voice) + (strength < WEAK ? "-weak" : ""), start, end);
  }
  const unread = on.unread && measured ? measured.read_from : 0;
  if (unread) mark("unread", 0, unread);
  for (const { start, end } of (on.copied && measured?.copied?.spans) || []) mark("copied", start, end);
  if (on.written) {
    let place = 0;
    for (const { text, node } of currentPieces()) {
      if (node.blend) mark("written", place, place + text.length);
      place += text.length;
    }
  }
  $("unread").hidden = !unread;
  if (unread) $("unread").style.height = `${topOfLine(unread)}px`;
  if (!window.CSS?.highlights) return; // an older browser: the lists beside the text say it
  CSS.highlights.clear();
  const priority = { unread: -1, copied: 1, written: 2 };
  const layer = $("marks").firstChild;
  for (const [name, places] of Object.entries(ranges)) {
    const highlight = new Highlight(
      ...places.map(([startOffset, endOffset]) =>
        new StaticRange({ startContainer: layer, startOffset, endContainer: layer, endOffset }),
      ),
    );
    highlight.priority = priority[name] ?? 0;
    CSS.highlights.set(name, highlight);
  }
}

/** How far down the line with this place begins, in pixels of the sheet. */
function topOfLine(place) {
  const range = document.createRange();
  range.setStart($("marks").firstChild, place);
  range.setEnd($("marks").firstChild, place + 1);
  return (range.getClientRects()[0]?.top ?? 0) - $("sheet").getBoundingClientRect().top;
}

/** Who wrote the words at the caret or under the pointer, and what was measured there. */
function paintHere() {
  const place = page.pointed ?? Math.max(0, area.selectionStart - 1);
  const within = ({ start, end }) => start <= place && place < end;
  let end = 0;
  const piece = currentPieces().find(({ text }) => (end += text.length) > place);
  const copied = page.measured?.copied?.spans.find(within);
  const sentence = page.measured?.sentences?.find(within);
  const lean = sentence && `${named(sentence.voice)}, by ${number(sentence.strength)} nats a token`;
  const facts = [
    piece && originOf(piece.node),
    copied && `copied: ${copied.words} words of ${sourceOf(copied)}`,
    sentence && `sentence nearest to ${lean}`,
  ].filter(Boolean);
  const where = page.pointed === null ? "At the caret" : "Under the pointer";
  $("here").textContent = facts.length ? `${where}: ${facts.join("; ")}.` : "";
}

function originOf({ kind, blend }) {
  if (kind === "chosen") return `chosen of what ${blendName(blend)} would say next`;
  if (blend) return `written as ${blendName(blend)}`;
  return kind === "opened" ? "from a file" : "written by you";
}

const sourceOf = ({ work, voice, place }) =>
  `\u201c${work}\u201d (${named(voice)}), from word ${number(place)}`;

const KINDS = {
  root: () => "Beginning",
  typed: () => "You",
  opened: () => "Opened",
  chosen: () => "Next word",
  written: blendName,
};

/** One line for each node, in order; where it forks, its line holds a list for each branch. */
function branchesFrom(node, children) {
  const lines = [];
  while (node) {
    let next = children[node.id] ?? [];
    const line = { inserted: node.inserted, current: node.id === page.draft.current };
    while (node.kind === "typed" && next.length === 1 && next[0].kind === "typed") {
      // What was typed in several goes is one line: it leads to the last.
      [node] = next;
      next = children[node.id] ?? [];
      line.inserted += node.inserted;
      line.current ||= node.id === page.draft.current;
    }
    lines.push({
      id: node.id,
      what: KINDS[node.kind](node.blend),
      made: short(line.inserted) || (node.removed ? "(words taken out)" : ""),
      current: line.current,
      forks: next.length > 1 ? next.map((child) => branchesFrom(child, children)) : [],
    });
    node = next.length === 1 ? next[0] : null;
  }
  return lines;
}

function branchList(lines) {
  const items = lines.map(({ id, what, made, current, forks }) => {
    const state = current ? { "aria-current": "true" } : {};
    const line = button(() => go(id), state, element("em", {}, what), ` ${made}`);
    return item(line, ...forks.map(branchList));
  });
  return element("ul", {}, ...items);
}

function paintBranches() {
  const lines = branchesFrom(page.draft.nodes.root, childrenOf(page.draft));
  const focused = $("branches").contains(document.activeElement);
  if (!fill($("branches"), lines, () => [branchList(lines)])) return;
  const current = $("branches").querySelector("[aria-current]");
  if (focused) current?.focus();
  // Not scrollIntoView: it would scroll the page, too.
  const box = $("branches").getBoundingClientRect();
  const line = current.getBoundingClientRect();
  const isSeen = line.top >= box.top && line.bottom <= box.bottom;
  if (!isSeen) $("branches").scrollTop += line.top - box.top - LINE;
}

function paintMix() {
  const mix = page.draft.mix ?? {};
  const voices = mixed();
  const others = (page.model?.voices ?? []).filter((voice) => !(voice in mix));
  fill($("mix"), voices.map((voice) => [voice, colourOf(voice)]), () => voices.map(mixRow));
  fill($("add"), others, () => [
    element("option", { value: "" }, others.length ? "Choose\u2026" : "There is no other"),
    ...others.map((voice) => element("option", { value: voice }, named(voice))),
  ]);
  for (const input of $("mix").querySelectorAll("input")) {
    if (input !== document.activeElement || input.type === "range") input.value = mix[input.voice];
  }
  const rest = 1 - Object.values(mix).reduce((sum, weight) => sum + weight, 0);
  $("rest").textContent =
    Math.abs(rest) < 0.005 ? "" : `What is left of 1, ${number(rest)}, goes to no voice in particular.`;
  $("between").hidden = voices.length !== 2;
  if (voices.length !== 2) return;
  const [first, second] = voices;
  $("between-first").textContent = `${named(first)} ${mix[first].toFixed(2)}`;
  $("between-second").textContent = `${mix[second].toFixed(2)} ${named(second)}`;
  $("between-range").value = mix[second];
  $("between-range").setAttribute("aria-label", `From ${named(first)} to ${named(second)}`);
  $("between-range").setAttribute("aria-valuetext", blendName(mix));
}

function mixRow(voice) {
  const input = (type, min, max, label) => {
    const made = element("input", { type, min, max, step: 0.05, "aria-label": label, voice });
    made.addEventListener("input", () => {
      if (Number.isFinite(made.valueAsNumber)) weigh({ [voice]: made.valueAsNumber });
    });
    made.addEventListener("change", remix);
    return made;
  };
  const remove = () => {
    delete page.draft.mix[voice];
    weigh({});
    remix();
    $("add").focus();
  };
  return item(
    element("span", {}, dot(voice), named(voice)),
    input("number", -100, 100, `Weight of ${named(voice)}`),
    button(remove, { "aria-label": `Without ${named(voice)}` }, "\u00d7"),
    input("range", -1, 2, `Weight of ${named(voice)}, as a slider`),
  );
}

function paintMeasures() {
  const { measured, model } = page;
  const facts = [page.unmeasured, measured, compared(), words(page.text), model.copied];
  fill($("measures"), facts, () => {
    if (page.unmeasured) return [element("p", {}, page.unmeasured)];
    if (!measured) return [element("p", {}, "Nothing is measured yet.")];
    return [...readingFacts(measured), ...voiceFacts(measured), ...copyFacts(measured, model.copied)];
  });
}

function readingFacts({ read_from }) {
  const all = words(page.text);
  const read = words(page.text.slice(read_from));
  const what = read_from ? `only the last ${number(read)} of` : "all";
  return [element("p", {}, `To continue, the model reads ${what} ${number(all)} words.`)];
}

function voiceFacts({ sentences }) {
  if (!sentences) return [element("p", {}, "This model has too few voices to tell sentences apart.")];
  const rows = compared().map((voice) => {
    const count = sentences.filter((sentence) => sentence.voice === voice).length;
    return item(dot(voice), `${named(voice)}: ${count} of ${sentences.length} sentences`);
  });
  return [element("ul", { "aria-label": "Voices of the sentences" }, ...rows)];
}

function copyFacts({ copied }, index) {
  if (!copied || !index) {
    return [element("p", {}, "What is copied is not known: there is no index of the training text.")];
  }
  const { held_out: held } = index;
  const rows = [
    ["words", "this text", "other works*"],
    [`copied, ${index.words} or more in a row`, percent(copied.share), held && percent(held.copied)],
    [
      "longest copied run",
      number(copied.longest?.words ?? 0),
      held && `${held.longest_median}, at most ${held.longest_max}`,
    ],
  ].map((cells, row) => {
    const shown = held ? cells : cells.slice(0, 2);
    const scope = (column) => (row ? (column ? null : "row") : "col");
    const cell = (text, column) =>
      scope(column) ? element("th", { scope: scope(column) }, text) : element("td", {}, text);
    return element("tr", {}, ...shown.map(cell));
  });
  const facts = [element("table", { "aria-label": "Copied" }, ...rows)];
  if (copied.longest) facts.push(element("p", {}, `The longest: ${sourceOf(copied.longest)}.`));
  if (held) {
    const what = `${held.passages} passages of ${held.passage_words} words`;
    const note = `* ${what} of works that the model has not read.`;
    facts.push(element("p", { className: "note" }, note));
  }
  if (copied.spans.length) {
    facts.push(element("ol", { "aria-label": "Copied passages" }, ...copied.spans.map(copiedLine)));
  }
  return facts;
}

function copiedLine(span) {
  const text = short(page.text.slice(span.start, span.end), 60);
  const show = () => {
    area.focus();
    area.setSelectionRange(span.start, span.end);
    const top = $("sheet").getBoundingClientRect().top + topOfLine(span.start);
    window.scrollBy({ top: top - 3 * LINE, behavior: "instant" });
  };
  const source = `${span.words} words of ${sourceOf(span)}`;
  return item(button(show, {}, `\u201c${text}\u201d: ${source}`));
}

// ---- What the person does ----

const setting = (name) => (Number.isFinite($(name).valueAsNumber) ? $(name).valueAsNumber : undefined);

/** Records what was typed since the last time, as a node; further typing there adds to it. */
function record(alone = false) {
  const { draft, typing } = page;
  const now = area.value;
  const change = difference(page.text, now, area.selectionEnd);
  if (!change.removed && !change.inserted) return;
  const node = currentNode();
  const touches = change.at <= node.at + node.inserted.length && change.at + change.removed >= node.at;
  let changed = node;
  if (!alone && typing?.id === node.id && touches && !childrenOf(draft)[node.id]) {
    Object.assign(node, difference(typing.base, now, area.selectionEnd));
    unsaved.add(node.id);
  } else {
    page.typing = null;
    changed = add(draft, draft.current, change, { kind: "typed" });
    page.typing = { id: changed.id, base: page.text };
  }
  page.text = now;
  moveMarks(change);
  // Undo goes back by sentences.
  if (alone || /(\n|[.!?]["'\u201d\u2019)]*\s)$/.test(changed.inserted)) page.typing = null;
  changedText();
}

/** After each change of the text. */
function changedText() {
  saveSoon();
  paintSoon();
  measureSoon();
  if (page.choices && page.choices.text !== page.text) closeChoices();
}

/** Shows a node of the draft. */
function go(id) {
  stop();
  record();
  page.typing = null;
  const before = page.text;
  visit(page.draft, id);
  setText(textOf(page.draft, id));
  const { at, inserted } = difference(before, page.text);
  area.setSelectionRange(at + inserted.length, at + inserted.length);
  changedText();
}

function undo() {
  stop();
  record();
  const { parent } = currentNode();
  if (parent) go(parent);
}

function redo() {
  stop();
  record();
  const next = page.draft.last[page.draft.current];
  if (next) go(next);
}

/** Sets weights of the mix. */
function weigh(weights) {
  Object.assign(page.draft.mix, weights);
  saveSoon();
  paintSoon();
}

/** After the mix has another value: what is being written goes on with it. */
function remix() {
  if (page.writing) write();
  else measureSoon();
}

function stop() {
  if (!page.writing) return;
  page.writing.controller.abort();
  page.writing = null;
  say("Stopped. What came is kept.");
  changedText();
}

/** What is asked of the model to continue a text. */
function requestFor(text, best) {
  const { model, draft } = page;
  const request = {
    model: model.name,
    prompt: promptOf(text),
    blend: { ...draft.mix },
    seed: setting("seed") ?? crypto.getRandomValues(new Uint32Array(1))[0],
    ...(best ? { best_of: setting("best_of") ?? 8 } : { stream: true }),
  };
  for (const name of ["max_tokens", "temperature", "top_k", "top_p"]) {
    request[name] = setting(name) ?? Number($(name).defaultValue);
  }
  if (model.copied && setting("copy_guard")) request.copy_guard = setting("copy_guard");
  return request;
}

/** Lets the model continue the text: of the current node, or of its parent for another branch. */
async function write({ another = false, best = false } = {}) {
  stop();
  record();
  page.typing = null;
  if (!(await ready())) return;
  const { draft } = page;
  const node = currentNode();
  const from = another && node.kind === "written" ? node.parent : node.id;
  const base = textOf(draft, from);
  const kept = withoutBlanks(base);
  if (!kept.trim()) {
    say("Write some words first: the model continues them.");
    area.focus();
    return;
  }
  const request = requestFor(base, best);
  const { blend } = request;
  const change = { at: kept.length, removed: base.length - kept.length, inserted: "" };
  const writing = { controller: new AbortController() };
  page.writing = writing;
  const isMine = () => page.writing === writing; // it is not after a stop, whatever still comes
  let made = null;
  let came = "";
  let receipt = null;
  const take = (choice) => {
    came += choice.text;
    receipt = choice.receipt ?? receipt;
    if (!came) return;
    // A node is made with its first words, so that one who gets none loses nothing.
    made ??= add(draft, from, change, { kind: "written", blend });
    made.inserted = clean(came);
    // The first receipt comes before all words, so that a text that is stopped has one, too.
    if (receipt) made.receipt = receipt.text ? receipt : { ...receipt, text: came };
    unsaved.add(made.id);
    follow(() => setText(kept + made.inserted));
    changedText();
  };
  say(best ? `Writing ${request.best_of}, to keep the best\u2026` : "Writing\u2026");
  paintSoon();
  try {
    const response = await ask("/v1/completions", request, writing.controller.signal);
    const parts = best ? [await response.json()] : events(response);
    for await (const { choices } of parts) {
      if (!isMine()) return;
      if (choices.length) take(choices[0]);
    }
    const count = made && number(words(made.inserted));
    if (isMine()) say(made ? `${count} words written as ${blendName(blend)}.` : ENDED);
  } catch (error) {
    if (isMine()) alarm(error.message);
    page.stale = true;
  } finally {
    if (isMine()) {
      page.writing = null;
      changedText();
    }
  }
}

/** Changes the text; who is at its end stays there, with the caret and with the window. */
function follow(change) {
  const atEnd = area.selectionStart === area.value.length;
  const sawEnd = hiddenBelow(area.value.length) < 0;
  change();
  if (atEnd) area.setSelectionRange(area.value.length, area.value.length);
  if (sawEnd) reveal(area.value.length);
}

/** How far the line with this place lies behind the dock, in pixels. */
function hiddenBelow(place) {
  const line = $("sheet").getBoundingClientRect().top + topOfLine(place);
  return line + LINE - $("dock").getBoundingClientRect().top;
}

function reveal(place) {
  window.scrollBy({ top: Math.max(0, hiddenBelow(place)), behavior: "instant" });
}

let measureTimer = 0;
let measuring = null;

function measureSoon() {
  clearTimeout(measureTimer);
  if (!page.writing) measureTimer = setTimeout(measure, 600);
}

async function measure() {
  measuring?.abort();
  const { text } = page;
  if (!page.model) return;
  if (!text.trim()) {
    page.measured = null;
    page.unmeasured = "";
    paintSoon();
    return;
  }
  measuring = new AbortController();
  try {
    const voices = page.model.style ? compared() : [];
    const response = await ask("/gothic/measure", { text, voices }, measuring.signal);
    const measured = await response.json();
    if (page.text !== text) return; // it changed meanwhile, and will be measured again
    page.measured = measured;
    page.unmeasured = "";
  } catch (error) {
    if (error.name === "AbortError") return;
    page.unmeasured = `Not measured: ${error.message}`;
    if (error.busy) measureTimer = setTimeout(measure, 3000);
  }
  paintSoon();
}

// ---- Next words ----

async function askNext() {
  stop();
  record();
  if (!(await ready())) return;
  const { text } = page;
  const { mix } = page.draft;
  const at = area.selectionStart;
  const alone = mixed().map((voice) => ({ [voice]: 1 }));
  const isOneVoice = alone.length === 1 && mix[mixed()[0]] === 1;
  const blends = isOneVoice ? alone : [{ ...mix }, ...alone];
  if (!text.slice(0, at).trim()) {
    say("Put the caret behind some words: the next words are those after it.");
    return;
  }
  try {
    const body = { prompt: promptOf(text.slice(0, at)), blends, n: 10 };
    const { alternatives } = await (await ask("/gothic/alternatives", body)).json();
    if (page.text !== text) return;
    page.choices = { text, at, blends, alternatives };
    say("");
  } catch (error) {
    alarm(error.message);
    return;
  }
  const { alternatives } = page.choices;
  $("choices-place").textContent = `After \u201c\u2026${text.slice(0, at).trimEnd().slice(-30)}\u201d`;
  $("choices-columns").replaceChildren(
    ...blends.map((blend, column) => {
      const name = column < blends.length - alone.length ? "The mix" : blendName(blend);
      const lines = alternatives[column].map((word) => choiceLine(word, blend));
      const parts = [element("h2", {}, name), element("ol", {}, ...lines)];
      return element("section", { "aria-label": name }, ...parts);
    }),
  );
  $("choices").hidden = false;
  reveal(at);
}

function choiceLine({ text, probability }, blend) {
  // A word begins with a blank; what has none goes on with the word before.
  const shown = text.replace(/^ /, "").replace(/\n/g, "\u00b6") || "\u2423";
  const line = button(
    () => choose(text, probability, blend),
    {},
    element("span", {}, /^[\s\p{P}]/u.test(text) ? shown : `-${shown}`),
    " ",
    element("span", {}, percent(probability)),
  );
  line.style.setProperty("--likely", probability);
  return item(line);
}

/** A branch in which this word comes next, instead of what came there. */
function choose(word, probability, blend) {
  record();
  const { draft, text, choices } = page;
  if (!choices || choices.text !== text) return;
  const { length } = withoutBlanks(text.slice(0, choices.at));
  const change = { at: length, removed: text.length - length, inserted: clean(word) };
  page.typing = null;
  const node = add(draft, draft.current, change, { kind: "chosen", blend, probability });
  setText(textOf(draft, node.id));
  area.focus();
  area.setSelectionRange(page.text.length, page.text.length);
  changedText();
  askNext();
}

function closeChoices() {
  page.choices = null;
  if ($("choices").contains(document.activeElement)) area.focus();
  $("choices").hidden = true;
}

// ---- Files ----

/** The text, and behind it a block with its pieces and their receipts. */
function asMarkdown() {
  record();
  const pieces = currentPieces().map(({ text, node }) => {
    const { kind, blend, probability, receipt } = node;
    return { text, kind, blend, probability, receipt };
  });
  const block = JSON.stringify({ version: 1, mix: page.draft.mix, pieces });
  return `${page.text}${FENCE}${block}\n\`\`\`\n`;
}

/** The text of a file, and its pieces where it has some that can be understood. */
function fromMarkdown(content) {
  const place = content.lastIndexOf(FENCE);
  const end = content.trimEnd();
  if (place < 0 || !end.endsWith("\n```")) return { text: content };
  try {
    const { mix, pieces } = JSON.parse(end.slice(place + FENCE.length, -4));
    return { text: content.slice(0, place), mix: asBlend(mix) ?? {}, pieces: pieces.map(asPiece) };
  } catch {
    return { text: content, damaged: true };
  }
}

function asPiece({ text, kind, blend, probability, receipt }) {
  if (typeof text !== "string" || !Object.hasOwn(KINDS, kind)) throw new TypeError();
  const piece = { text, kind, blend: asBlend(blend), probability: Number(probability) || undefined };
  if (receipt !== null && typeof receipt === "object") piece.receipt = receipt;
  return piece;
}

/** Voices and weights of any origin, or undefined. */
function asBlend(value) {
  if (value === null || typeof value !== "object") return undefined;
  return Object.fromEntries(Object.entries(value).filter(([, weight]) => Number.isFinite(weight)));
}

async function openFile(file) {
  let content;
  try {
    if (file.size > LARGEST_FILE) throw new Error(`${file.name} is larger than 8 MiB.`);
    const bytes = await file.arrayBuffer();
    content = clean(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    alarm(error.name === "TypeError" ? `${file.name} is not text in UTF-8.` : error.message);
    return;
  }
  const { text, mix, pieces = [], damaged } = fromMarkdown(content);
  const draft = newDraft(page.draft);
  let place = 0;
  for (const { text: piece, ...facts } of pieces) {
    add(draft, draft.current, { at: place, removed: 0, inserted: piece }, facts);
    place += piece.length;
  }
  // Another program may have changed the text: that is one change more.
  const change = difference(textOf(draft, draft.current), text);
  if (change.removed || change.inserted) add(draft, draft.current, change, { kind: "opened" });
  if (mix) draft.mix = mix;
  leaveDraft();
  openDraft(draft);
  changedText();
  say(damaged ? "Opened as plain text: its receipts cannot be read." : `${file.name} is open.`);
}

async function copy() {
  const content = asMarkdown();
  try {
    // Browsers have a clipboard only on https and this machine's own address.
    await navigator.clipboard.writeText(content);
    say("Copied, with receipts.");
  } catch {
    alarm("The browser does not let the page copy. Download the text instead.");
  }
}

function download() {
  const url = URL.createObjectURL(new Blob([asMarkdown()], { type: "text/markdown" }));
  const name = page.text.trim().split("\n", 1)[0].replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  element("a", { href: url, download: `${name.replace(/^-|-$/g, "") || "draft"}.md` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
  say("Downloaded, with receipts.");
}

// ---- Drafts ----

function leaveDraft() {
  stop();
  record();
  save();
}

/** Shows a draft; whatever goes on in another one was stopped before. */
function openDraft(draft) {
  const { model } = page;
  if (model) {
    const pair = withOthers([], model.voices);
    const mix = draft.mix ?? Object.fromEntries(pair.map((voice) => [voice, 1 / pair.length]));
    const known = Object.entries(mix).filter(([voice]) => model.voices.includes(voice));
    draft.mix = Object.fromEntries(known);
  }
  for (const name of SETTINGS) $(name).value = draft.settings[name] ?? $(name).defaultValue;
  for (const mark of MARKS) {
    const box = $(`mark-${mark}`);
    box.checked = draft.settings[mark] ?? box.defaultChecked;
  }
  if (page.draft !== draft) {
    unsaved.clear();
    closeChoices();
    Object.assign(page, { draft, typing: null, measured: null, unmeasured: "", pointed: null });
    area.value = page.text = textOf(draft, draft.current);
    area.setSelectionRange(page.text.length, page.text.length);
  }
  listDrafts();
  paintSoon();
  measureSoon();
}

function deleteDraft() {
  const title = page.draft.title || "Empty draft";
  if (!confirm(`Delete \u201c${title}\u201d with all its branches?`)) return;
  stop();
  clearTimeout(saveTimer);
  saveTimer = 0;
  unstored.delete(page.draft.id);
  try {
    localStorage.removeItem(STORED + page.draft.id);
  } catch {
    // Where there is no storage there is nothing to remove.
  }
  openDraft(allDrafts()[0] ?? newDraft(page.draft));
  area.focus();
}

// ---- The start ----

/** Whether the model is there; after a failure the server may have come back with another one. */
async function ready() {
  if (page.model && !page.stale) return true;
  try {
    await loadModel();
    page.stale = false;
    return true;
  } catch (error) {
    alarm(error.message);
    return false;
  }
}

function listen() {
  const on = (id, event, action) => $(id).addEventListener(event, action);
  on("continue", "click", () => (page.writing ? stop() : write()));
  on("another", "click", () => write({ another: true }));
  on("best", "click", () => write({ best: true }));
  on("next", "click", askNext);
  on("undo", "click", undo);
  on("redo", "click", redo);
  on("choices-close", "click", closeChoices);
  on("copy", "click", copy);
  on("download", "click", download);
  on("delete", "click", deleteDraft);
  on("open", "click", () => $("file").click());
  on("file", "change", async () => {
    if ($("file").files[0]) await openFile($("file").files[0]);
    $("file").value = "";
  });
  on("new", "click", () => {
    leaveDraft();
    openDraft(newDraft(page.draft));
    area.focus();
  });
  on("drafts", "change", () => {
    const { value } = $("drafts");
    leaveDraft();
    openDraft(allDrafts().find(({ id }) => id === value) ?? page.draft);
  });

  on("text", "input", (event) => {
    stop();
    layMarks();
    if (event.isComposing) return; // an input method is not done with its word
    record(/^(insertFrom(Paste|Drop)|deleteBy(Cut|Drag))$/.test(event.inputType));
  });
  on("text", "compositionend", () => record());
  on("text", "beforeinput", (event) => {
    // The browser's own history knows nothing of the model's words.
    if (event.inputType === "historyUndo") undo();
    else if (event.inputType === "historyRedo") redo();
    else return;
    event.preventDefault();
  });
  document.addEventListener("selectionchange", paintHere);
  on("text", "pointermove", ({ clientX, clientY }) => {
    const found = document.caretPositionFromPoint?.(clientX, clientY);
    page.pointed = found?.offsetNode === area ? found.offset : null;
    paintHere();
  });
  on("text", "pointerleave", () => {
    page.pointed = null;
    paintHere();
  });

  on("add", "change", () => {
    const { value } = $("add");
    const none = mixed().length === 0;
    $("add").value = "";
    weigh({ [value]: none ? 1 : 0 });
    remix();
  });
  on("between-range", "input", () => {
    const [first, second] = mixed();
    const weight = $("between-range").valueAsNumber;
    weigh({ [first]: Number((1 - weight).toFixed(2)), [second]: weight });
  });
  on("between-range", "change", remix);
  for (const name of [...SETTINGS, ...MARKS]) {
    const input = $(name) ?? $(`mark-${name}`);
    input.addEventListener("change", () => {
      const isMark = MARKS.includes(name);
      if (!isMark && !input.checkValidity()) input.value = input.defaultValue;
      page.draft.settings[name] = isMark ? input.checked : input.value;
      saveSoon();
      paintSoon();
    });
  }

  document.addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase();
    const writing = event.target === area;
    if (event.isComposing) return;
    if (key === "escape" && (page.writing || page.choices)) page.writing ? stop() : closeChoices();
    else if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
    else if (key === "enter") write({ another: event.shiftKey });
    else if (key === ".") askNext();
    else if (key === "s") download();
    else if (writing && key === "z" && !event.shiftKey) undo();
    else if (writing && (key === "y" || key === "z")) redo();
    else return;
    event.preventDefault();
  });

  const isFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  for (const kind of ["dragleave", "drop"]) {
    document.addEventListener(kind, () => document.body.classList.remove("dragging"));
  }
  document.addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files[0]) openFile(event.dataTransfer.files[0]);
  });

  addEventListener("storage", (event) => {
    if (event.key === STORED + page.draft.id && event.newValue) {
      record();
      adopt(readDraft(event.key));
      setText(textOf(page.draft, page.draft.current));
    }
    listDrafts();
    paintSoon();
  });
  addEventListener("pagehide", leaveDraft);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) save();
  });
  new ResizeObserver(paintSoon).observe($("sheet"));
}

function begin() {
  let open = null;
  try {
    open = readDraft(STORED + sessionStorage.getItem(OPEN_HERE));
  } catch {
    alarm("This browser keeps no storage for the page: drafts are lost when it closes.", "storage");
  }
  openDraft(open ?? allDrafts()[0] ?? newDraft());
  listen();
  ready();
}

begin();
