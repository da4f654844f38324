// The server's OpenAI-compatible interface, as far as the page needs it.
export class Refused extends Error {
  constructor(status, error) {
    super((error && error.message) || String(status));
    this.status = status;
    this.code = error && error.code;
  }
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  let error = null;
  try { error = (await response.json()).error; } catch { /* not our server's form */ }
  throw new Refused(response.status, error);
}

export async function models(key) {
  const response = await checked(await fetch("v1/models", { headers: headers(key) }));
  const { data } = await response.json();
  const able = data.filter((model) => !model.tasks || model.tasks.includes("chat"));
  return (able.length ? able : data).map((model) => model.id);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the stream ended before its end was said");
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

// Parts of an answer: {text, tokens} where tokens are {token, logprob, top_logprobs}, {reason} at its end, {n} in all.
export async function* answer(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const sent = await fetch("v1/chat/completions", { method: "POST", headers: headers(key), signal, body });
  for await (const event of events(await checked(sent))) {
    if (event.error) throw new Refused(500, event.error);
    if (event.usage) yield { n: event.usage.completion_tokens };
    const choice = event.choices[0];
    if (!choice) continue;
    const tokens = (choice.logprobs && choice.logprobs.content) || [];
    if (choice.delta.content || tokens.length) yield { text: choice.delta.content || "", tokens };
    if (choice.finish_reason) yield { reason: choice.finish_reason };
  }
}
