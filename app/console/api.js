// The public API, with the key that somebody pasted. The key lives in this tab's sessionStorage and in no other place; it goes on
// sign-out, on the first 401, and after half an hour without input.

import { hearDate } from "./dom.js";

const ROOT = new URL("../v1/", location.href.split("#")[0]);
const READ_SECONDS = 20;
export const IDLE_MS = 30 * 60 * 1000;

/** What the page checks before it sends files: bytes in a body, bytes in a file, number of files. */
export const LIMITS = JSON.parse(document.querySelector("meta[name=limits]").content);

// --- exact numbers ----------------------------------------------------------------------------------------------------

// JSON's numbers can have more digits than JavaScript's. What would be rounded is kept as it was written.
const exact =
  typeof JSON.rawJSON === "function"
    ? (_, value, context) => (typeof value === "number" && context?.source !== undefined && String(value) !== context.source ? JSON.rawJSON(context.source) : value)
    : undefined;

/** JSON text to values that JSON.stringify writes again as they were. */
export function parse(text) {
  return JSON.parse(text, exact);
}

// --- refusals ---------------------------------------------------------------------------------------------------------

/** A reply that is no success. `errors` is the list of a 422. */
export class Problem extends Error {
  constructor(status, document, headers) {
    super((typeof document?.detail === "string" && document.detail) || `The service answered ${status}.`);
    this.status = status;
    this.code = document?.code ?? "";
    this.document = document ?? {};
    this.errors = Array.isArray(document?.detail) ? document.detail : [];
    if (this.errors.length) this.message = this.errors[0].msg;
    const after = Number.parseInt(headers.get("retry-after") ?? "", 10);
    this.retryAfter = Number.isNaN(after) ? null : after;
    this.inProgress = headers.get("idempotency-status") === "in_progress";
    this.requestId = headers.get("x-request-id") ?? "";
  }
}

/** No reply came: the network, the service or a proxy is down, or nothing of it came for too long. */
export class Unreachable extends Error {
  constructor(slow) {
    super(slow ? `Nothing came from the service for ${READ_SECONDS} s.` : navigator.onLine ? "The service cannot be reached." : "This computer is offline.");
  }
}

// --- the key ----------------------------------------------------------------------------------------------------------

/** The signed-in caller: whoami's reply, or what can be known without it. */
export const me = { key: "", known: false, scopes: [], organization_id: "", name: "", key_id: "", user_id: null, machine_id: null, expires_at: null };

export function may(scope) {
  if (me.machine_id) return scope === "runs:read"; // an executor's key sees its machine's runs, and nobody should report by hand
  return me.scopes.includes("*") || me.scopes.includes(scope);
}

let out = () => {};
let lastInput = Date.now();

/** `signedOut(why, organization)` is called when the key has gone. */
export function watchKey(signedOut) {
  out = signedOut;
  for (const kind of ["pointerdown", "pointermove", "keydown", "wheel", "touchstart", "input"]) {
    addEventListener(kind, heard, { passive: true, capture: true });
  }
  // A page that comes back from the browser's memory, or from sleep, looks before it shows anything.
  addEventListener("pageshow", checkIdle);
  document.addEventListener("visibilitychange", checkIdle);
  setInterval(checkIdle, 1000);
}

function heard() {
  if (!me.key || checkIdle()) return;
  const now = Date.now();
  if (now - lastInput > 5000) sessionStorage.setItem("last-input", String(now));
  lastInput = now;
}

function idleSince(then) {
  const silent = Date.now() - then;
  return !(silent > -60_000 && silent < IDLE_MS); // also when there is no time, or one in the future
}

/** Signs out, and returns true, when nobody has been here for too long. */
export function checkIdle() {
  if (!me.key || !idleSince(lastInput)) return false;
  signOut("idle");
  return true;
}

/** The key that this tab had before it was loaded again, if somebody was here lately. */
export function storedKey() {
  const key = sessionStorage.getItem("api-key") ?? "";
  if (key && idleSince(Number(sessionStorage.getItem("last-input") ?? Number.NaN))) {
    sessionStorage.clear();
    return { key: "", idle: true };
  }
  return { key, idle: false };
}

/** Asks who this is. Raises Problem or Unreachable; nothing is kept then. */
export async function signIn(key) {
  me.key = key;
  lastInput = Date.now();
  try {
    try {
      const { data } = await call("GET", "whoami", { quiet: true });
      Object.assign(me, data, { known: true });
    } catch (problem) {
      if (problem.code !== "route_not_found") throw problem;
      await call("GET", "runs", { query: { limit: 1, fields: "id" }, quiet: true });
      Object.assign(me, { known: false, scopes: ["*"], organization_id: "", name: "", key_id: "" });
    }
  } catch (problem) {
    me.key = "";
    throw problem;
  }
  sessionStorage.setItem("api-key", key);
  sessionStorage.setItem("last-input", String(lastInput));
}

export function signOut(why) {
  const organization = me.organization_id;
  Object.assign(me, { key: "", known: false, scopes: [], organization_id: "", name: "", key_id: "", user_id: null, machine_id: null, expires_at: null });
  sessionStorage.clear();
  out(why, organization);
}

// --- requests ---------------------------------------------------------------------------------------------------------

/** Aborts when nothing has come for so many seconds; heard() says that something has. */
function silence(seconds) {
  const abort = new AbortController();
  let timer = 0;
  const heard = () => {
    clearTimeout(timer);
    if (seconds) timer = setTimeout(() => abort.abort(), seconds * 1000);
  };
  heard();
  return { signal: abort.signal, heard, end: () => clearTimeout(timer) };
}

/** The body as text, however long it takes while something comes. */
async function read(response, heard) {
  if (!response.body) return response.text();
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let text = "";
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    heard();
    text += decoder.decode(piece.value, { stream: true });
  }
  return text + decoder.decode();
}

/**
 * One request: {data, text, tag}. `seconds` bounds how long nothing comes, not how long all of it takes. `known` is the tag of a
 * reply that the caller has: if it is as it was, data is null. `quiet` leaves a 401 to the caller. A signal's abort comes through
 * as AbortError. Raises Problem and Unreachable.
 */
export async function call(method, path, { query, body, idempotencyKey, signal, seconds = READ_SECONDS, quiet = false, blob = false, known = "" } = {}) {
  // What was about to ask when the page signed out asks nothing any more.
  if (!me.key) throw new DOMException("Signed out.", "AbortError");
  const url = new URL(path, ROOT);
  for (const [name, value] of Object.entries(query ?? {})) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(name, value);
  }
  const headers = { Authorization: `Bearer ${me.key}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (idempotencyKey) headers["Idempotency-Key"] = idempotencyKey;
  if (known) headers["If-None-Match"] = known;
  const timeout = silence(seconds);
  const signals = [signal, timeout.signal].filter(Boolean);
  const asked = me.key;
  let response;
  let text = "";
  let data = null;
  try {
    response = await fetch(url, {
      method,
      headers,
      body,
      signal: AbortSignal.any(signals),
      cache: "no-store",
      redirect: "error",
      referrerPolicy: "no-referrer",
    });
    if (blob && response.ok) return { data: await response.blob(), headers: response.headers };
    timeout.heard();
    text = await read(response, timeout.heard);
  } catch (error) {
    if (signal?.aborted) throw new DOMException("No longer wanted.", "AbortError");
    throw new Unreachable(timeout.signal.aborted);
  } finally {
    timeout.end();
  }
  if (me.key !== asked) throw new DOMException("Signed out meanwhile.", "AbortError");
  hearDate(response.headers.get("date"));
  const tag = response.headers.get("etag") ?? "";
  if (response.status === 304) return { data: null, text: "", tag, headers: response.headers };
  try {
    data = text ? parse(text) : null;
  } catch {
    if (response.ok) throw new Unreachable(false); // a proxy's page, or a reply cut short
  }
  if (!response.ok) {
    const problem = new Problem(response.status, data, response.headers);
    if (problem.status === 401 && !quiet) {
      signOut("refused");
      throw Object.assign(new DOMException("Signed out.", "AbortError"), { refused: true }); // it took no effect
    }
    throw problem;
  }
  return { data, text, tag, headers: response.headers };
}

/** What the service said lately of a list whose page was too large: how many of it fit, and since when we know. */
const fitting = new Map();
const FITTING_MS = 60_000;

/**
 * A page of a list, as call() does. When so many of it are too large for one reply, fewer are asked for, as the service says.
 * `lean` is what `fields` is first: the same rows without their long parts.
 */
export async function page(path, { query, lean, signal }) {
  let known = fitting.get(path);
  if (known && Date.now() - known.at > FITTING_MS) known = undefined;
  const wanted = { ...query };
  if (known?.lean && lean) wanted.fields = lean;
  if (known?.limit) wanted.limit = Math.min(wanted.limit, known.limit);
  for (;;) {
    try {
      return await call("GET", path, { query: wanted, signal });
    } catch (error) {
      const told = error.errors?.find?.((one) => one.type === "page_too_large");
      if (!told || wanted.limit <= 1) throw error;
      if (lean && wanted.fields !== lean) wanted.fields = lean;
      else wanted.limit = Math.max(1, Math.min(Math.floor(wanted.limit / 2), Number(/limit=(\d+) fits/.exec(told.msg)?.[1] ?? Infinity)));
      fitting.set(path, { at: Date.now(), lean: wanted.fields === lean, limit: wanted.limit < query.limit ? wanted.limit : 0 });
    }
  }
}

export function aborted(error) {
  return error?.name === "AbortError";
}

/** 128 random bits: works without a secure context too, unlike crypto.randomUUID. */
export function newIdempotencyKey() {
  const random = crypto.getRandomValues(new Uint8Array(16));
  return `console-${Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

/** A file of a run, saved under its own name; the key goes in a header and never into a URL. */
export async function save(attachment) {
  const { data } = await call("GET", `run-attachments/${attachment.id}/download`, { blob: true, seconds: 0 });
  // As bytes of no type: whatever it claims to be, no browser shows it in place.
  const url = URL.createObjectURL(new Blob([data], { type: "application/octet-stream" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = attachment.filename;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// --- polling ----------------------------------------------------------------------------------------------------------

const EVERY_MS = 2000;
const SLOWEST_MS = 30_000;

/** Asks again and again while somebody can see it: 2 s after the last reply, more slowly when replies are slow or fail. */
class Poll {
  round = null;
  paused = false;
  problem = null; // the last failure, until a round succeeds
  last = 0; // when a round succeeded
  next = 0; // when the next one begins
  busy = false;
  #timer = 0;
  #abort = null;
  #wait = EVERY_MS;
  changed = () => {};

  constructor() {
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.now(!this.last)));
    addEventListener("online", () => this.now());
  }

  /** From now on this; null for nothing. */
  set(round) {
    this.stop();
    Object.assign(this, { round, problem: null, last: 0 });
    this.#wait = EVERY_MS;
    this.now(true);
  }

  stop() {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    this.#abort = null;
    this.busy = false;
  }

  pause(paused) {
    this.paused = paused;
    if (paused) clearTimeout(this.#timer);
    else this.now();
    this.changed();
  }

  /** What the screen is about has come, if not yet all that goes with it. */
  heard() {
    this.last = Date.now();
    this.problem = null;
    this.changed();
  }

  /** A round at once; with `asked` also while paused. */
  async now(asked = false) {
    this.stop();
    if (!this.round || !me.key || document.hidden || (this.paused && !asked)) return;
    const { round } = this;
    const abort = (this.#abort = new AbortController());
    const began = performance.now();
    this.busy = true;
    this.changed();
    try {
      await round(abort.signal);
      if (this.#abort !== abort) return;
      this.last = Date.now();
      this.problem = null;
      this.#wait = Math.max(EVERY_MS, 10 * (performance.now() - began));
    } catch (error) {
      if (aborted(error) || this.#abort !== abort) return;
      this.problem = error;
      this.#wait = error.retryAfter ? error.retryAfter * 1000 : Math.min(SLOWEST_MS, this.#wait * 2);
      if (!(error instanceof Problem || error instanceof Unreachable)) console.error(error);
    }
    this.busy = false;
    this.next = Date.now() + this.#wait;
    if (!this.paused) this.#timer = setTimeout(() => this.now(), this.#wait);
    this.changed();
  }
}

export const poll = new Poll();
