// The review page. What comes from outside becomes text (textContent) or a picture of the server's own making (a blob),
// never markup. A decision is only shown as made when the server has said that it is in the store.
"use strict";

const AHEAD = 3; // images that are held: the one on the page and those fetched before they are asked for
const SETTLE_MS = 250; // a key that is pressed twice must not decide the next picture
const RETRY_MS = 2000;
const LOOK_AGAIN_MS = 15000;
const KINDS = { first: "First review", second: "Second opinion", appeal: "Appeal" };
const ANSWERS = { violating: "violating", not: "not violating", unsure: "unsure", unseen: "not seen" };

const $ = (id) => document.getElementById(id);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

const token = takeToken();
let about = null;
let items = [];
const pictures = new Map(); // by id of an image: a promise of { url } or { problem, passing }
let picture = null; // what has come of the image on the page
let chosen = new Set();
let revealed = false;
let busy = false;
let shownAt = 0;
let category = null;
let generation = 0; // of the filter: answers for an earlier one are dropped
let filling = Promise.resolve();
let progress = { done: 0, total: 0, skipped: 0, mine: 0, answers: {}, can_undo: false };
let elsewhere = 0;
let timer = 0;

/** The address's fragment never leaves the browser; it is kept for this tab, and taken out of what is on the screen. */
function takeToken() {
  const given = location.hash.slice(1);
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", "/");
  }
  return given || sessionStorage.getItem("token") || "";
}

class Trouble extends Error {
  constructor(message, { passing = false, gone = false } = {}) {
    super(message);
    this.passing = passing;
    this.gone = gone;
  }
}

async function call(path, body) {
  const request = { headers: { Authorization: `Bearer ${token}` }, cache: "no-store", credentials: "omit" };
  if (body !== undefined) {
    request.method = "POST";
    request.headers["Content-Type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, request);
  } catch {
    throw new Trouble("The server does not answer: is jobs.review still running?", { passing: true });
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  let said = { error: text };
  try {
    said = JSON.parse(text);
  } catch {
    // An answer without JSON is a sentence.
  }
  throw new Trouble(said.error || `The server answered ${answer.status}.`, {
    passing: answer.status >= 500,
    gone: Boolean(said.gone),
  });
}

/** Sends what must not be lost until the server has it. The same id again decides nothing twice. */
async function surely(path, body, what) {
  for (;;) {
    try {
      return await (await call(path, body)).json();
    } catch (trouble) {
      if (!(trouble instanceof Trouble) || !trouble.passing) throw trouble;
      tell(`${what} is not saved yet. ${trouble.message} Trying again; leave this page open.`, "bad");
      await wait(RETRY_MS);
    }
  }
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function tell(text, tone = "") {
  $("status").textContent = text;
  $("status").className = tone;
}

function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
}

// Pictures

async function fetchPicture(id) {
  const answer = await call(`/api/picture/${id}`);
  if (answer.headers.get("Content-Type") === "image/jpeg") return { url: URL.createObjectURL(await answer.blob()) };
  const { problem, may_pass: passing } = await answer.json();
  return { problem, passing };
}

function load(item) {
  if (pictures.has(item.id)) return;
  const coming = fetchPicture(item.id).catch((trouble) => ({ problem: trouble.message, passing: true, failed: true }));
  pictures.set(item.id, coming);
}

async function drop(item) {
  const coming = pictures.get(item.id);
  pictures.delete(item.id);
  const { url } = (await coming) || {};
  if (url) URL.revokeObjectURL(url);
}

// What is on the page

function show() {
  clearTimeout(timer);
  const item = items[0];
  $("review").hidden = !item;
  $("end").hidden = Boolean(item);
  picture = null;
  revealed = false;
  chosen = new Set();
  if (!item) return showEnd();
  shownAt = performance.now();
  $("picture").hidden = true;
  $("picture").removeAttribute("src");
  $("name").textContent = item.name;
  showChoices(item);
  showHistory(item.history ? "What was said of it" : "", item.history);
  paint();
  $("stage").focus({ preventScroll: true });
  load(item);
  pictures.get(item.id).then((come) => {
    if (items[0] !== item) return;
    picture = come;
    shownAt = performance.now();
    if (come.url) $("picture").src = come.url;
    paint();
  });
}

function paint() {
  $("frame").classList.toggle("blurred", !revealed);
  $("picture").hidden = !(picture && picture.url);
  $("picture").alt = revealed ? "Picture under review" : "Picture under review, blurred";
  const notice = picture ? picture.problem : "Fetching the picture";
  $("notice").hidden = !notice;
  $("notice").textContent = notice || "";
  $("reveal").hidden = !(picture && picture.url);
  $("reveal").replaceChildren(revealed ? "Blur it again " : "Show the picture ", make("kbd", "Space"));
  const visible = Boolean(picture && picture.url);
  for (const id of ["violating", "not-violating"]) $(id).disabled = busy || !visible;
  $("unsure").disabled = busy || !picture || Boolean(picture.failed);
  $("not-seen").hidden = !(picture && picture.problem) || Boolean(picture.failed);
  $("not-seen").disabled = busy;
  $("retry").hidden = !(picture && picture.passing);
  $("skip").disabled = busy;
  const undo = busy || !progress.can_undo;
  $("undo").disabled = undo;
  $("end-undo").disabled = undo;
  $("last").disabled = busy || !progress.mine;
}

function showChoices(item) {
  const several = item.categories.length > 1;
  $("categories").hidden = !several;
  $("confirm").textContent = several ? "Violating" : `Violating: ${item.categories[0]}`;
  const choices = item.categories.map((name, place) => {
    const label = make("label", undefined, "choice");
    const box = make("input");
    box.type = "checkbox";
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(name);
      else chosen.delete(name);
    });
    label.append(box, make("span", name));
    if (place < 9) label.append(make("kbd", String(place + 1)));
    return label;
  });
  $("choices").replaceChildren(...(several ? choices : []));
}

function toggleChoice(place) {
  const box = $("choices").querySelectorAll("input")[place];
  if (!box) return;
  box.checked = !box.checked;
  box.dispatchEvent(new Event("change"));
}

function showProgress() {
  const { done, total, mine } = progress;
  $("count").textContent = `${done.toLocaleString("en")} of ${total.toLocaleString("en")}`;
  $("bar").max = Math.max(1, total);
  $("bar").value = done;
  const words = about && [KINDS[about.kind], about.reviewer, `${mine.toLocaleString("en")} by you in this session`];
  $("who").textContent = words ? words.join(" · ") : "";
  paint();
}

function showEnd() {
  const { done, total, skipped, answers } = progress;
  let title = "Everything here is decided.";
  let text = `${done.toLocaleString("en")} of ${total.toLocaleString("en")} images have a decision.`;
  if (!total) {
    title = "There is nothing to review here.";
    text = "The runs flagged and drew nothing of this kind.";
  } else if (done < total) {
    title = "Nothing is left for you at the moment.";
    const parts = [];
    if (skipped) parts.push(`${skipped.toLocaleString("en")} you left for later`);
    if (elsewhere) parts.push(`${elsewhere.toLocaleString("en")} are with other reviewers`);
    text += ` Of the others ${parts.join(", ") || "none can be had now"}.`;
  }
  if (about && about.left_to_others) {
    text += ` ${about.left_to_others.toLocaleString("en")} more were decided by you before: somebody else has to look.`;
  }
  $("end-title").textContent = title;
  $("end-text").textContent = text;
  const list = Object.entries(answers).map(([answer, count]) => make("li", `${answer}: ${count.toLocaleString("en")}`));
  $("end-head").textContent = list.length ? "Your decisions in this session" : "";
  $("end-list").replaceChildren(...list);
  paint();
  $("end").focus({ preventScroll: true });
  timer = setTimeout(fill, LOOK_AGAIN_MS);
}

// History

function showHistory(title, history) {
  $("history").hidden = !history;
  $("history-title").textContent = title;
  $("history-body").replaceChildren(...(history ? [...history.tests.flatMap(describeTest), ...describeDecisions(history.decisions)] : []));
}

const shown = (score) => (score === null || score === undefined ? "–" : score.toFixed(4));

function describeTest(part) {
  const named = `${part.category}: ${part.outcome}`;
  const said = [part.score === null ? named : `${named}, score ${shown(part.score)}`];
  if (part.match_bank) said.push(`It matches bank ${part.match_bank} at a distance of ${part.match_distance} bits.`);
  if (part.recommended_action) said.push(`Recommended: ${part.recommended_action}.`);
  if (part.outcome === "cleared") said.push(`Drawn for the audit with probability ${part.probability}.`);
  said.push(`Run ${part.run_id}.`);
  const lines = said.map((line) => make("p", line));
  if (!part.tests.length) return lines;
  const table = make("table");
  const head = make("tr");
  for (const name of ["stage", "group", "score", "threshold"]) head.append(make("th", name));
  table.append(head);
  for (const test of part.tests) {
    const row = make("tr");
    const cells = [`${test.stage}, round ${test.round + 1}`, String(test.group_size), shown(test.score), shown(test.threshold)];
    for (const cell of cells) row.append(make("td", cell));
    table.append(row);
  }
  return [...lines, table];
}

function describeDecisions(decisions) {
  return decisions.map((decision) => {
    const what = decision.categories.length ? `${decision.answer} (${decision.categories.join(", ")})` : decision.answer;
    return make("p", `${KINDS[decision.kind] || decision.kind}: ${what}, ${decision.reviewer}, ${decision.decided_at}`);
  });
}

async function showLast() {
  if (busy || !progress.mine) return;
  try {
    const last = await (await call("/api/history", {})).json();
    showHistory(`The last one: ${last.name}`, last.history);
    if (about.kind !== "appeal") {
      progress.can_undo = false;
      tell("That decision stays now: you have seen what was said of it.");
    }
    if ($("review").hidden) showInEnd();
    paint();
  } catch (trouble) {
    tell(trouble.message, "bad");
  }
}

/** At the end there is no side panel: the lines go where the summary is. */
function showInEnd() {
  const lines = [...$("history-body").querySelectorAll("p")].map((line) => make("li", line.textContent));
  $("end-head").textContent = $("history-title").textContent;
  $("end-list").replaceChildren(...lines);
}

// What a reviewer does

function fill(again) {
  const mine = generation;
  filling = filling.then(async () => {
    if (mine !== generation || (items.length >= AHEAD && !again)) return;
    const body = { have: items.map((item) => item.id), category, wanted: Math.max(1, AHEAD - items.length), again: again === true };
    try {
      const found = await (await call("/api/next", body)).json();
      if (mine !== generation) return;
      const empty = !items.length;
      const before = JSON.stringify([progress, elsewhere]);
      const held = new Set(items.map((item) => item.id));
      items.push(...found.items.filter((item) => !held.has(item.id)));
      elsewhere = found.elsewhere;
      progress = found.progress;
      items.forEach(load);
      showProgress();
      const idle = !items.length && !$("end").hidden && before === JSON.stringify([progress, elsewhere]);
      if (idle) timer = setTimeout(fill, LOOK_AGAIN_MS);
      else if (empty) show();
    } catch (trouble) {
      tell(trouble.message, "bad");
      if (trouble.passing) timer = setTimeout(() => fill(again), RETRY_MS);
    }
  });
  return filling;
}

function reveal() {
  if (!picture || !picture.url) return;
  revealed = !revealed;
  paint();
}

function setGrey(on) {
  $("frame").classList.toggle("grey", on);
  $("grey").setAttribute("aria-pressed", String(on));
  sessionStorage.setItem("grey", on ? "1" : "");
}

async function decide(answer) {
  const item = items[0];
  if (!item || busy || !picture || performance.now() - shownAt < SETTLE_MS) return;
  if ((answer === ANSWERS.violating || answer === ANSWERS.not) && !picture.url) return;
  if (answer === ANSWERS.unseen && (!picture.problem || picture.failed)) return;
  if (answer === ANSWERS.unsure && picture.failed) return;
  if (answer === ANSWERS.not && !revealed) {
    tell("Look at it first (Space): a blurred picture cannot be cleared.", "bad");
    return;
  }
  let categories = [];
  if (answer === ANSWERS.violating) {
    categories = item.categories.length > 1 ? item.categories.filter((name) => chosen.has(name)) : item.categories;
    if (!categories.length) {
      tell("Say first what it violates: press its number.", "bad");
      return;
    }
  } else if (answer === ANSWERS.not && chosen.size) {
    tell("You have chosen what it violates: take that back, or press V.", "bad");
    return;
  }
  busy = true;
  paint();
  tell("Saving");
  try {
    await surely("/api/decide", { id: item.id, decision_id: newId(), answer, categories, revealed }, "Your decision");
    tell(`Saved: ${categories.length && item.categories.length > 1 ? categories.join(", ") : answer}.`, "good");
    progress.done += 1;
    progress.mine += 1;
    progress.can_undo = true;
    take(item);
  } catch (trouble) {
    tell(trouble.message, "bad");
    if (trouble.gone) take(item);
  } finally {
    busy = false;
    paint();
  }
}

/** Takes the image off the page and shows the next one, which is there already. */
function take(item) {
  items = items.filter((other) => other !== item);
  drop(item);
  busy = false;
  showProgress();
  if (items.length) show();
  else {
    $("review").hidden = true;
  }
  fill();
}

async function undo() {
  if (busy || !progress.can_undo) return;
  busy = true;
  paint();
  try {
    const { item } = await surely("/api/undo", { decision_id: newId() }, "That you take it back");
    items = items.filter((other) => other.id !== item.id);
    items.unshift(item);
    // The server holds what is dropped here, and gives it out again.
    items.splice(AHEAD).forEach(drop);
    progress.done -= 1;
    progress.mine -= 1;
    progress.can_undo = progress.mine > 0;
    tell("Taken back: decide again.", "good");
    busy = false;
    showProgress();
    show();
  } catch (trouble) {
    tell(trouble.message, "bad");
    progress.can_undo = false;
  } finally {
    busy = false;
    paint();
  }
}

async function skip() {
  const item = items[0];
  if (!item || busy) return;
  busy = true;
  try {
    await call("/api/skip", { id: item.id });
    tell("Left for later.");
    take(item);
  } catch (trouble) {
    tell(trouble.message, "bad");
    if (trouble.gone) take(item);
  } finally {
    busy = false;
    paint();
  }
}

function retry() {
  const item = items[0];
  if (!item) {
    fill(true);
    return;
  }
  if (!picture || !picture.passing) return;
  drop(item);
  show();
}

function choose(name) {
  category = name || null;
  generation += 1;
  items.splice(0).forEach(drop);
  $("review").hidden = true;
  $("category").blur();
  fill();
}

const KEYS = {
  " ": reveal,
  v: () => decide(ANSWERS.violating),
  n: () => decide(ANSWERS.not),
  u: () => decide(ANSWERS.unsure),
  x: () => decide(ANSWERS.unseen),
  z: undo,
  s: skip,
  g: () => setGrey(!$("frame").classList.contains("grey")),
  h: showLast,
  r: retry,
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !about) return;
  const target = event.target.tagName;
  // Controls that have the focus keep their own keys.
  if (target === "SELECT" || (event.key === " " && (target === "BUTTON" || target === "INPUT"))) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key in KEYS) {
    event.preventDefault();
    KEYS[key]();
  } else if (/^[1-9]$/.test(key) && !$("review").hidden) {
    event.preventDefault();
    toggleChoice(Number(key) - 1);
  }
});

const CLICKS = {
  reveal, violating: KEYS.v, "not-violating": KEYS.n, unsure: KEYS.u, "not-seen": KEYS.x, undo, skip, grey: KEYS.g,
  last: showLast, retry, again: retry, "end-undo": undo,
};
for (const [id, act] of Object.entries(CLICKS)) {
  $(id).addEventListener("click", (event) => {
    // A key pressed next is meant for the picture; who moves by keyboard keeps their place.
    if (event.detail) $("stage").focus({ preventScroll: true });
    act();
  });
}
$("category").addEventListener("change", (event) => choose(event.target.value));
window.addEventListener("beforeunload", (event) => busy && event.preventDefault());

async function start() {
  setGrey(Boolean(sessionStorage.getItem("grey")));
  try {
    about = await (await call("/api/about")).json();
  } catch (trouble) {
    $("count").textContent = "";
    tell(trouble.message, "bad");
    return;
  }
  document.title = `${KINDS[about.kind]} · ${about.reviewer}`;
  $("filter").hidden = about.categories.length < 2;
  $("category").append(new Option("all", ""), ...about.categories.map((name) => new Option(name, name)));
  await fill();
}

start();
