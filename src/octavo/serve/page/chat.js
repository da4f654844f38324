// Everything a person or the model wrote is put on the page as text, never as markup.
import * as saved from "./saved.js";
import { Refused, answer, models } from "./talk.js";
import { WORDS, preferred } from "./words.js";

const FIELDS = ["system", "temperature", "top_p", "repetition_penalty", "top_k", "max_tokens", "seed", "language", "theme"];
const NEUTRAL = { top_p: "1", repetition_penalty: "1", top_k: "0", max_tokens: "", seed: "" };
const $ = (id) => document.getElementById(id);

let words = WORDS.en;
let chat = fresh();
let running = null;

function fresh() {
  return { id: Date.now().toString(36) + Math.random().toString(36).slice(2), title: "", model: "", at: 0, messages: [] };
}

function element(name, kind, text = "") {
  const node = document.createElement(name);
  node.className = kind;
  node.textContent = text;
  return node;
}

function button(text, act) {
  const node = element("button", "quiet small", text);
  node.type = "button";
  node.addEventListener("click", () => act(node));
  return node;
}

// ---- words, colours, settings

function translate() {
  const language = $("language").value;
  words = WORDS[language];
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = words[node.dataset.t];
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = words[node.dataset.placeholder];
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", words[node.dataset.label]);
}

function applySettings() {
  document.documentElement.dataset.theme = $("theme").value;
  for (const id of ["temperature", "top_p", "repetition_penalty"]) $(id + "-value").textContent = String(Number($(id).value));
  $("temperature-value").textContent = Number($("temperature").value).toFixed(1);
}

function restoreSettings() {
  const kept = saved.settings();
  $("language").value = preferred();
  for (const id of FIELDS) if (typeof kept[id] === "string") $(id).value = kept[id];
  if (!WORDS[$("language").value]) $("language").value = preferred();
  $("probabilities").checked = kept.probabilities !== false;
  applySettings();
}

function keepSettings() {
  const all = Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
  saved.keepSettings({ ...all, probabilities: $("probabilities").checked });
}

// What is sent beside the messages; what has no effect is left out.
function sampling() {
  const found = { temperature: Number($("temperature").value) };
  for (const [id, neutral] of Object.entries(NEUTRAL)) {
    if ($(id).value !== neutral && $(id).value !== "") found[id] = Number($(id).value);
  }
  return $("probabilities").checked ? { ...found, logprobs: true, top_logprobs: 5 } : found;
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("toggle").setAttribute("aria-expanded", String(open));
}

function openMenu(open) {
  document.body.classList.toggle("menu-open", open);
  $("shade").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
}

// ---- what is shown

// Nodes at the end of the log; they belong to a message and go with it.
function put(index, ...nodes) {
  $("empty").hidden = true;
  for (const node of nodes) node.dataset.index = index;
  $("turns").append(...nodes);
  nodes.at(-1).scrollIntoView({ block: "end" });
}

function say(kind, text) {
  put(chat.messages.length - 1, element("div", kind + " turn", text));
}

// Forget the conversation from message ``end`` on.
function cut(end) {
  chat.messages.length = end;
  for (const node of [...$("turns").children]) if (Number(node.dataset.index) >= end) node.remove();
}

function atEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
}

function copy(node, text) {
  navigator.clipboard?.writeText(text).then(() => {
    node.textContent = words.copied;
    setTimeout(() => { node.textContent = words.copy; }, 1500);
  });
}

function showMessage(index) {
  const message = chat.messages[index];
  const turn = element("div", "turn " + message.role, message.content);
  const tools = element("div", "tools " + message.role + "-tools");
  if (message.role === "user") {
    tools.append(button(words.edit, () => edit(index, turn, tools)));
  } else {
    tools.append(button(words.copy, (node) => copy(node, message.content)));
    tools.append(button(words.again, () => goOn(index)));
    if (message.speed) tools.append(element("span", "speed", words.speed(...message.speed)));
  }
  put(index, turn, tools);
}

function showChat() {
  $("turns").replaceChildren();
  $("empty").hidden = chat.messages.length > 0;
  chat.messages.forEach((_, index) => showMessage(index));
  if ([...$("model").options].some((option) => option.value === chat.model)) $("model").value = chat.model;
  refresh();
}

function showList() {
  $("list").replaceChildren(...saved.chats().map((other) => {
    const row = element("li", other.id === chat.id ? "current" : "");
    const open = button(other.title || words.untitled, () => switchTo(other));
    open.className = "open";
    row.append(open, twice("remove", button("", () => {}), () => { saved.remove(other.id); other.id === chat.id ? switchTo(fresh()) : showList(); }));
    return row;
  }));
}

// A button that has to be pressed twice.
function twice(name, node, act) {
  let sure = false;
  const say = (asked) => { sure = asked; node.textContent = words[asked ? "sure" : name]; };
  node.addEventListener("click", () => {
    const was = sure;
    say(!was);
    if (was) act();
    else setTimeout(() => say(false), 3000);
  });
  say(false);
  return node;
}

function refresh() {
  $("send").textContent = running ? words.stop : words.send;
  $("send").disabled = !running && !$("input").value.trim();
}

function fit(input) {
  input.style.height = "auto";
  input.style.height = input.scrollHeight + 2 + "px";
}

// ---- probabilities

function showProbe(span) {
  const probe = $("probe");
  const rows = span.tokens.flatMap((token) => {
    const others = token.top_logprobs.filter((other) => other.token !== token.token);
    return [row(token, "chosen"), ...others.map((other) => row(other, ""))];
  });
  probe.replaceChildren(...rows);
  probe.hidden = false;
  const at = span.getClientRects()[0];
  const { width, height } = probe.getBoundingClientRect();
  probe.style.left = Math.max(8, Math.min(at.left, innerWidth - width - 8)) + "px";
  probe.style.top = (at.bottom + height + 12 < innerHeight ? at.bottom + 6 : at.top - height - 6) + "px";
}

function row(token, kind) {
  const share = Math.exp(token.logprob);
  const node = element("div", "share " + kind);
  const bar = element("i", "bar");
  bar.style.width = Math.max(1, share * 100) + "%";
  const shown = token.token.replaceAll("\n", "↵").replaceAll(" ", "␣") || "∅";
  node.append(bar, element("span", "token", shown), element("span", "", (share * 100).toFixed(share > 0.1 ? 0 : 1) + " %"));
  return node;
}

// ---- a conversation

function explain(error) {
  if (!(error instanceof Refused)) return words.offline;
  if (error.status === 401) { $("key-field").hidden = false; openSettings(true); return words.needKey; }
  if (error.status === 429) return words.busy;
  return error.code === "context_length_exceeded" ? words.tooLong : error.message;
}

async function loadModels() {
  const names = await models($("key").value);
  const before = $("model").value;
  $("model").replaceChildren(...names.map((name) => Object.assign(element("option", "", name), { value: name })));
  if (names.includes(chat.model || before)) $("model").value = chat.model || before;
}

// Lets the answer grow in ``node``; gives {reason, speed}.
async function hear(node, signal) {
  const system = $("system").value.trim();
  const messages = chat.messages.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const began = performance.now();
  let first = 0, last = 0, n = 0, reason = "", waiting = [];
  for await (const part of answer({ model: $("model").value, messages, ...sampling() }, $("key").value, signal)) {
    if (part.reason) reason = part.reason;
    if (part.n) n = part.n;
    if (part.text === undefined) continue;
    last = performance.now();
    first ||= last;
    waiting.push(...part.tokens);
    if (!part.text) continue; // the token ends inside a character
    const follow = atEnd();
    const span = document.createElement("span");
    span.textContent = part.text;
    if (waiting.length) { span.tokens = waiting; span.className = "t"; waiting = []; }
    node.append(span);
    if (follow) node.scrollIntoView({ block: "end" });
  }
  const rate = last > first ? ((n - 1) / (last - first)) * 1000 : 0;
  const speed = rate ? [n, rate.toFixed(rate < 10 ? 1 : 0), ((first - began) / 1000).toFixed(2)] : null;
  return { reason, speed };
}

// Answers the conversation up to message ``end``; what came after it is forgotten.
async function goOn(end) {
  if (running) return;
  const own = new AbortController();
  const mine = chat;
  running = own;
  cut(end);
  refresh();
  const node = element("div", "turn assistant running");
  put(end, node);
  let heard = { reason: "", speed: null };
  let failure = null;
  try {
    if (!$("model").value) await loadModels();
    chat.model = $("model").value;
    heard = await hear(node, own.signal);
  } catch (error) {
    failure = error;
  }
  if (running === own) running = null;
  const text = node.textContent;
  if (text) mine.messages.push({ role: "assistant", content: text, speed: heard.speed });
  if (mine !== chat) { if (text) saved.keep(mine); showList(); refresh(); return; } // another one is shown meanwhile
  node.classList.remove("running");
  if (text) {
    const spans = [...node.childNodes]; // they know their probabilities
    showMessage(mine.messages.length - 1);
    node.nextElementSibling.replaceChildren(...spans);
  }
  node.remove();
  if (own.signal.aborted) say("hint", words.stopped);
  else if (failure) say("error", explain(failure));
  else if (!text) say("hint", words.empty);
  else if (heard.reason === "length") say("hint", words.cut);
  if (!text) takeBack(failure && !own.signal.aborted);
  if (mine.messages.length && !saved.keep(mine)) say("error", words.full);
  showList();
  refresh();
}

// A question without an answer is not part of the conversation; after a failure it is put back to be sent again.
function takeBack(again) {
  const asked = chat.messages.at(-1);
  if (!asked || asked.role !== "user") return;
  chat.messages.pop();
  const index = chat.messages.length;
  for (const node of $("turns").querySelectorAll(".error, .hint")) {
    if (Number(node.dataset.index) >= index) node.dataset.index = index - 1; // what was said of it stays
  }
  if (!again || $("input").value) return;
  $("input").value = asked.content;
  fit($("input"));
  cut(index);
}

function ask(text, index = chat.messages.length) {
  if (running) return;
  cut(index);
  chat.messages.push({ role: "user", content: text });
  showMessage(index);
  chat.title = chat.messages[0].content.slice(0, 60);
  chat.at = Date.now();
  goOn(chat.messages.length);
}

function edit(index, turn, tools) {
  if (running) return;
  const box = element("textarea", "edit");
  box.value = chat.messages[index].content;
  const close = () => { box.replaceWith(turn); row.replaceWith(tools); };
  const done = () => { const text = box.value.trim(); if (text) ask(text, index); };
  const row = element("div", "tools user-tools");
  row.append(button(words.cancel, close), button(words.ask, done));
  box.addEventListener("input", () => fit(box));
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (enters(event)) { event.preventDefault(); done(); }
  });
  box.dataset.index = row.dataset.index = index;
  turn.replaceWith(box);
  tools.replaceWith(row);
  fit(box);
  box.focus();
}

function switchTo(other) {
  if (running) { const old = running; running = null; old.abort(); }
  chat = other;
  openMenu(false);
  showChat();
  showList();
  if (innerWidth > 800) $("input").focus();
}

function submit() {
  if (running) { running.abort(); return; }
  const text = $("input").value.trim();
  if (!text) return;
  $("input").value = "";
  fit($("input"));
  ask(text);
}

// Enter that ends the composition of a Chinese word must not send the message.
const enters = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

function listen() {
  $("toggle").addEventListener("click", () => openSettings($("settings").hidden));
  $("menu").addEventListener("click", () => openMenu(!document.body.classList.contains("menu-open")));
  $("shade").addEventListener("click", () => openMenu(false));
  $("new").addEventListener("click", () => switchTo(fresh()));
  $("export").addEventListener("click", saved.exportAll);
  $("input").addEventListener("input", () => { fit($("input")); refresh(); });
  $("input").addEventListener("keydown", (event) => {
    if (enters(event)) { event.preventDefault(); if (!running) submit(); }
    if (event.key === "ArrowUp" && !$("input").value) [...document.querySelectorAll(".user-tools button")].at(-1)?.click();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (running) running.abort();
    openMenu(false);
    openSettings(false);
  });
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("settings").addEventListener("submit", (event) => { event.preventDefault(); openSettings(false); });
  $("settings").addEventListener("input", () => { applySettings(); keepSettings(); });
  $("language").addEventListener("change", () => { translate(); showList(); if (!running) showChat(); refresh(); });
  $("key").addEventListener("change", () => loadModels().catch((error) => say("error", explain(error))));
  $("model").addEventListener("change", () => { chat.model = $("model").value; });
  for (const kind of ["pointerover", "click"]) {
    $("turns").addEventListener(kind, (event) => { event.target.tokens ? showProbe(event.target) : ($("probe").hidden = true); });
  }
  const hide = () => { $("probe").hidden = true; };
  $("turns").addEventListener("pointerleave", hide);
  $("log").addEventListener("scroll", hide);
  addEventListener("resize", hide);
}

restoreSettings();
translate();
listen();
twice("removeAll", $("remove-all"), () => { saved.removeAll(); switchTo(fresh()); });
showList();
fit($("input"));
refresh();
loadModels().catch((error) => say("error", explain(error)));
