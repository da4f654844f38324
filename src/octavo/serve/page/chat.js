"use strict";
// Everything a person or the model wrote is put on the page as text, never as markup.

const WORDS = {
  en: {
    settings: "Settings", newChat: "New chat", system: "System prompt", systemHint: "How the model should behave (optional)",
    temperature: "Temperature", key: "API key", welcome: "Ask the model something.", placeholder: "Write a message",
    send: "Send", stop: "Stop", note: "A small model makes things up. It runs on your own machine.",
    stopped: "Stopped.", cut: "Cut off: the limit was reached.", offline: "The server does not answer.",
    empty: "The model had nothing to say.", needKey: "This server asks for a key. Enter it above.",
    tooLong: "This conversation no longer fits into the model. Start a new chat.",
  },
  zh: {
    settings: "设置", newChat: "新对话", system: "系统提示", systemHint: "希望模型如何表现（可不填）",
    temperature: "温度", key: "API 密钥", welcome: "问模型一个问题吧。", placeholder: "写点什么",
    send: "发送", stop: "停止", note: "小模型会出错。它就在你自己的机器上运行。",
    stopped: "已停止。", cut: "已达到长度上限。", offline: "服务器没有回应。",
    empty: "模型没有说话。", needKey: "服务器需要密钥，请在上方输入。",
    tooLong: "对话已超出模型的长度，请开始新对话。",
  },
};
const language = (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
const words = WORDS[language];
const $ = (id) => document.getElementById(id);

const messages = [];
let model = "";
let running = null;

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = words[node.dataset.t];
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = words[node.dataset.placeholder];
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", words[node.dataset.label]);
}

function show(kind, text) {
  $("empty").hidden = true;
  const node = document.createElement("div");
  node.className = kind === "hint" || kind === "error" ? kind + " turn" : "turn " + kind;
  node.textContent = text;
  $("log").append(node);
  node.scrollIntoView({ block: "end" });
  return node;
}

function atEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
}

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

function refresh() {
  $("send").textContent = running ? words.stop : words.send;
  $("send").disabled = !running && !$("input").value.trim();
}

function fit() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = input.scrollHeight + 2 + "px";
  refresh();
}

class Refused extends Error {
  constructor(status, error) {
    super((error && error.message) || String(status));
    this.status = status;
    this.code = error && error.code;
  }
}

async function refuse(response) {
  let error = null;
  try { error = (await response.json()).error; } catch { /* not our server's form */ }
  throw new Refused(response.status, error);
}

function explain(error) {
  if (error instanceof Refused) {
    if (error.status === 401) { $("key-field").hidden = false; openSettings(true); return words.needKey; }
    return error.code === "context_length_exceeded" ? words.tooLong : error.message;
  }
  return words.offline;
}

async function loadModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) await refuse(response);
  model = (await response.json()).data[0].id;
  $("model").textContent = model;
  $("model").title = model;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const line = buffer.slice(0, end);
      buffer = buffer.slice(end + 2);
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

async function answer(node, signal) {
  const system = $("system").value.trim();
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), signal,
    body: JSON.stringify({
      model, stream: true, temperature: Number($("temperature").value),
      messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    }),
  });
  if (!response.ok) await refuse(response);
  let reason = "";
  for await (const event of events(response)) {
    if (event.error) throw new Refused(500, event.error);
    const choice = event.choices[0];
    if (!choice) continue;
    const follow = atEnd();
    if (choice.delta.content) node.append(document.createTextNode(choice.delta.content));
    if (follow) node.scrollIntoView({ block: "end" });
    reason = choice.finish_reason || reason;
  }
  return reason;
}

async function send(text) {
  const restore = messages.length;
  const asked = show("user", text);
  messages.push({ role: "user", content: text });
  const node = show("assistant running", "");
  const own = new AbortController();
  running = own;
  refresh();
  let reason = "";
  let failure = null;
  try {
    if (!model) await loadModel();
    reason = await answer(node, own.signal);
  } catch (error) {
    failure = error;
  }
  if (running !== own) return; // a new chat was begun meanwhile
  running = null;
  node.classList.remove("running");
  if (node.textContent) {
    messages.push({ role: "assistant", content: node.textContent });
  } else {
    node.remove();
    messages.length = restore; // an unanswered question is not part of the conversation
  }
  if (own.signal.aborted) show("hint", words.stopped);
  else if (failure) show("error", explain(failure));
  else if (!node.textContent) show("hint", words.empty);
  else if (reason === "length") show("hint", words.cut);
  if (failure && !own.signal.aborted && messages.length === restore && !$("input").value) {
    $("input").value = text; // nothing typed is lost
    asked.remove();
  }
  fit();
}

function newChat() {
  const old = running;
  running = null;
  if (old) old.abort();
  messages.length = 0;
  for (const node of $("log").querySelectorAll(".turn")) node.remove();
  $("empty").hidden = false;
  refresh();
  $("input").focus();
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("toggle").setAttribute("aria-expanded", String(open));
}

function submit() {
  if (running) { running.abort(); return; }
  const text = $("input").value.trim();
  if (!text) return;
  $("input").value = "";
  fit();
  send(text);
}

function start() {
  translate();
  const showTemperature = () => { $("temperature-value").textContent = Number($("temperature").value).toFixed(1); };
  $("temperature").addEventListener("input", showTemperature);
  $("toggle").addEventListener("click", () => openSettings($("settings").hidden));
  $("new").addEventListener("click", newChat);
  $("input").addEventListener("input", fit);
  $("input").addEventListener("keydown", (event) => {
    // Enter that ends the composition of a Chinese word must not send the message.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    if (!running) submit();
  });
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("settings").addEventListener("submit", (event) => { event.preventDefault(); openSettings(false); });
  $("key").addEventListener("change", () => loadModel().catch((error) => show("error", explain(error))));
  showTemperature();
  fit();
  loadModel().catch((error) => show("error", explain(error)));
}

start();
