// The review page. What comes from outside becomes text (textContent) or a picture of the server's own making (a blob),
// never markup. A decision is only shown as made when the server has said that it is in the store.
"use strict";

const AHEAD = 3; // images that are held: the one on the page and those fetched before they are asked for
const SETTLE_MS = 250; // a key that is pressed twice must not decide the next picture
const RETRY_MS = 2000;
const LOOK_AGAIN_MS = 15000;
const KINDS = { first: "First review", second: "Second opinion", appeal: "Appeal" };
const SEEN = "That decision stays: you have seen what was said of it.";
const ANSWERS = { violating: "violating", not: "not violating", unsure: "unsure", unseen: "not seen" };

const $ = (id) => document.getElementById(id);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

const token = takeToken();
let about = null;
let items = [];
const pictures = new Map(); // by id of an image: a promise of { url } or { problem, passing, lost }
let picture = null; // what has come of the image on the page
let chosen = new Set();
let revealed = false;
let busy = false;
let shownAt = 0;
let category = null;
let generation = 0; // of the filter: answers for an earlier one are dropped
let filling = Promise.resolve();
let progress = { done: 0, total: 0, skipped: 0, waiting: 0, mine: 0, answers: {}, can_undo: false };
let elsewhere = 0;
let timer = 0;
let lookingBack = false; // the history on the page is of the image decided last

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
  const { problem, may_pass: passing, lost } = await answer.json();
  return { problem, passing, lost };
}

function load(item) {
  if (pictures.has(item.id)) return;
  const coming = fetchPicture(item.id).catch((trouble) => ({ problem: trouble.message, passing: true, lost: false }));
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
  showName("name", item.name);
  showChoices(item);
  $("side").append($("history"));
  showOwnHistory();
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
  const notice = picture ? describeProblem(picture) : "Fetching the picture";
  $("notice").hidden = !notice;
  $("notice").textContent = notice || "";
  $("reveal").hidden = !(picture && picture.url);
  $("reveal").replaceChildren(revealed ? "Blur it again " : "Show the picture ", make("kbd", "Space"));
  const visible = Boolean(picture && picture.url);
  for (const id of ["violating", "not-violating", "unsure"]) $(id).disabled = busy || !visible;
  $("not-seen").hidden = !(picture && picture.lost);
  $("not-seen").disabled = busy;
  $("retry").hidden = !(picture && picture.passing);
  $("skip").disabled = busy;
  const undo = busy || !progress.can_undo;
  $("undo").disabled = undo;
  $("end-undo").disabled = undo;
  for (const id of ["last", "end-last"]) {
    $(id).disabled = busy || !(progress.mine || lookingBack);
    $(id).setAttribute("aria-pressed", String(lookingBack));
  }
}

/** What is wrong, and which keys help. */
function describeProblem({ problem, passing, lost }) {
  if (!problem) return "";
  const ways = [];
  if (passing) ways.push("try again (R)", "leave it for later (S)");
  if (lost) ways.push("say that it could not be seen (X)");
  return `${problem} You can ${ways.join(", or ")}.`;
}

/** The whole name, over as many lines as it takes; one that is longer than its box is reached by Tab and scrolled. */
function showName(id, name) {
  const element = $(id);
  element.hidden = !name;
  element.textContent = name;
  element.title = name;
  element.scrollTop = 0;
  if (element.scrollHeight > element.clientHeight) element.tabIndex = 0;
  else element.removeAttribute("tabindex");
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
  if (progress.waiting) {
    text += ` ${progress.waiting.toLocaleString("en")} that you left unsure stay open: somebody else has to look.`;
  }
  $("end-title").textContent = title;
  $("end-text").textContent = text;
  const list = Object.entries(answers).map(([answer, count]) => make("li", `${answer}: ${count.toLocaleString("en")}`));
  $("end-head").textContent = list.length ? "Your decisions in this session" : "";
  $("end-list").replaceChildren(...list);
  $("end").append($("history"));
  if (!lookingBack) showOwnHistory();
  paint();
  $("end").focus({ preventScroll: true });
  timer = setTimeout(fill, LOOK_AGAIN_MS);
}

// History

/** Of the image on the page, where there is one and the kind of review shows it before the decision. */
function showOwnHistory() {
  lookingBack = false;
  const history = items.length ? items[0].history : undefined;
  showHistory(history ? "What was said of it" : "", "", history);
}

function showHistory(title, name, history) {
  $("history").hidden = !history;
  $("history-title").textContent = title;
  showName("history-name", name);
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

/** Shows the history of the image decided last; where it is shown already, what was there before. */
async function showLast() {
  if (busy) return;
  if (lookingBack) {
    showOwnHistory();
    paint();
    return;
  }
  if (!progress.mine) return;
  try {
    const last = await (await call("/api/history", {})).json();
    lookingBack = true;
    showHistory("What was said of the last one", last.name, last.history);
    if (about.kind !== "appeal") {
      progress.can_undo = false;
      tell(SEEN);
    }
    paint();
  } catch (trouble) {
    tell(trouble.message, "bad");
  }
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

/** What keeps the answer from being given now, in words. */
function objection(answer, item) {
  if (answer === ANSWERS.not && !revealed) return "Look at it first (Space): a blurred picture cannot be cleared.";
  if (answer === ANSWERS.not && chosen.size) return "You have chosen what it violates: take that back, or press V.";
  if (answer === ANSWERS.violating && item.categories.length > 1 && !chosen.size) return "Say first what it violates: press its number.";
  return "";
}

async function decide(answer) {
  const item = items[0];
  if (!item || busy || !picture || performance.now() - shownAt < SETTLE_MS) return;
  if (answer === ANSWERS.unseen ? !picture.lost : !picture.url) return;
  const trouble = objection(answer, item);
  if (trouble) {
    tell(trouble, "bad");
    return;
  }
  const several = item.categories.length > 1;
  const categories = answer === ANSWERS.violating ? item.categories.filter((name) => !several || chosen.has(name)) : [];
  const body = { id: item.id, decision_id: newId(), answer, categories, revealed };
  await finish(item, "Saving", async () => {
    await surely("/api/decide", body, "Your decision");
    tell(`Saved: ${several && categories.length ? categories.join(", ") : answer}.`, "good");
    progress.done += 1;
    progress.mine += 1;
    progress.can_undo = true;
  });
}

async function skip() {
  const item = items[0];
  if (!item || busy) return;
  await finish(item, "Leaving it for later", async () => {
    await call("/api/skip", { id: item.id });
    tell("Left for later.");
  });
}

/** Has the server do what ends an image's time on the page, and goes on with the next one. */
async function finish(item, saying, act) {
  busy = true;
  paint();
  tell(saying);
  try {
    await act();
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
  lookingBack = false;
  showProgress();
  if (items.length) show();
  else {
    $("review").hidden = true;
  }
  fill();
}

async function undo() {
  if (busy) return;
  if (!progress.can_undo) {
    tell(progress.mine ? SEEN : "There is nothing of this session to take back.");
    return;
  }
  busy = true;
  lookingBack = false;
  paint();
  tell("Taking it back");
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

function retry() {
  const item = items[0];
  if (!item) {
    fill(true);
    return;
  }
  if (busy || !picture || !picture.passing) return;
  drop(item);
  show();
  items.slice(1).forEach(loadAgain);
}

/** What was fetched ahead in vain would else have to be asked for one by one. */
async function loadAgain(item) {
  const { passing } = (await pictures.get(item.id)) || {};
  if (!passing || !items.includes(item)) return;
  drop(item);
  load(item);
}

function choose(name) {
  category = name || null;
  generation += 1;
  items.splice(0).forEach(drop);
  lookingBack = false;
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
    act(KEYS[key]);
  } else if (/^[1-9]$/.test(key) && !$("review").hidden) {
    event.preventDefault();
    act(() => toggleChoice(Number(key) - 1));
  }
});

/** What the line at the bottom says is of what was done last. */
function act(what) {
  if (!busy) tell("");
  what();
}

const CLICKS = {
  reveal, violating: KEYS.v, "not-violating": KEYS.n, unsure: KEYS.u, "not-seen": KEYS.x, undo, skip, grey: KEYS.g,
  last: showLast, retry, again: retry, "end-undo": undo, "end-last": showLast,
};
for (const [id, what] of Object.entries(CLICKS)) {
  $(id).addEventListener("click", (event) => {
    // A key pressed next is meant for the picture; who moves by keyboard keeps their place.
    if (event.detail) $("stage").focus({ preventScroll: true });
    act(what);
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
