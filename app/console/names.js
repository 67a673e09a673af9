// Names for ids: workflows, machines and pools are asked for once and then rarely.

import { aborted, call, page } from "./api.js";
import { short, theirs } from "./dom.js";

// Workflows carry their prompts along: their list is not asked for again soon.
const kinds = {
  workflows: { fresh: 300_000, byId: new Map(), at: 0, name: (item) => item.name || firstLine(item.main_prompt) },
  machines: { fresh: 30_000, byId: new Map(), at: 0, name: (item) => item.name || item.hostname },
  pools: { fresh: 30_000, byId: new Map(), at: 0, name: (item) => item.name },
};
const FOUND = 20; // of a search
const missing = new Set();
let asking = new Map();

function firstLine(text) {
  const line = String(text ?? "").trim().split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

/** Everything is forgotten at sign-out. */
export function forget() {
  for (const kind of Object.values(kinds)) {
    kind.byId.clear();
    kind.at = 0;
  }
  missing.clear();
  asking = new Map();
}

/** The newest of a kind; `now` if what is known must not be a little old. */
export async function load(kind, signal, now = false) {
  const known = kinds[kind];
  if (!now && Date.now() - known.at < known.fresh) return;
  const { data } = await page(kind, { query: { limit: kind === "workflows" ? 100 : 1000 }, signal });
  known.at = Date.now();
  for (const item of data.items) known.byId.set(item.id, item);
}

/** Those that are not among the newest, one by one; a few at a time. */
export async function loadMissing(kind, ids, signal) {
  const wanted = [...new Set(ids)].filter((id) => id && !kinds[kind].byId.has(id) && !missing.has(id) && !asking.has(id));
  await Promise.all(
    wanted.slice(0, 24).map(async (id) => {
      asking.set(id, true);
      try {
        const { data } = await call("GET", `${kind}/${id}`, { signal });
        kinds[kind].byId.set(id, data);
      } catch (error) {
        if (!aborted(error) && error.status === 404) missing.add(id);
      } finally {
        asking.delete(id);
      }
    }),
  );
}

/** Keeps one that somebody else has asked for. */
export function learn(kind, item) {
  kinds[kind].byId.set(item.id, item);
  missing.delete(item.id);
}

/** Those with this text in their name or id, the newest first, as the service finds them among all. */
export async function find(kind, text, signal) {
  const { data } = await page(kind, { query: { search: text, limit: FOUND }, signal });
  for (const item of data.items) learn(kind, item);
  return data;
}

export function get(kind, id) {
  return kinds[kind].byId.get(id);
}

export function all(kind) {
  return [...kinds[kind].byId.values()];
}

/** What people call it, as text; the beginning of its id if that is not known. */
export function nameOf(kind, id) {
  const item = get(kind, id);
  return (item && kinds[kind].name(item)) || String(id).slice(0, 8);
}

/** The same as an element. */
export function named(kind, id) {
  if (!id) return null;
  const item = get(kind, id);
  const name = item && kinds[kind].name(item);
  if (!name) return short(id);
  const node = theirs(name);
  node.title = `${name}\n${id}`;
  return node;
}
