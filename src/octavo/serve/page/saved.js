// What stays in the browser: conversations {id, title, model, at, messages}, and settings.
const CHATS = "octavo.chats";
const SETTINGS = "octavo.settings";

function read(key, otherwise) {
  try { return JSON.parse(localStorage.getItem(key)) ?? otherwise; } catch { return otherwise; }
}

function write(key, value) {
  try { localStorage.setItem(key, JSON.stringify(value)); return true; } catch { return false; }
}

export const chats = () => read(CHATS, []);
export const settings = () => read(SETTINGS, {});
export const keepSettings = (value) => write(SETTINGS, value);

// Read anew each time: another tab may have written meanwhile. False: there is no room.
export function keep(chat) {
  return write(CHATS, [chat, ...chats().filter((other) => other.id !== chat.id)]);
}

export function remove(id) {
  return write(CHATS, chats().filter((chat) => chat.id !== id));
}

export function removeAll() {
  localStorage.removeItem(CHATS);
}

export function exportAll() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(chats(), null, 1)], { type: "application/json" }));
  link.download = "octavo-chats.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
