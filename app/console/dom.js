// Elements, times and words: what every screen is made of. Whatever a caller of the API wrote becomes a text node, never markup.

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "disabled", "selected", "indeterminate", "htmlFor", "className", "open"]);

/** An element: h("button.primary", {type: "button", onclick: act}, "Retry"). Null and false are left out, lists are flattened. */
export function h(tag, props, ...children) {
  const [name, ...classes] = tag.split(".");
  const node = document.createElement(name);
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "vars") for (const [variable, text] of Object.entries(value)) node.style.setProperty(variable, text);
    else if (PROPERTIES.has(key)) node[key] = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...flat(children));
  return node;
}

/** The nodes and texts among children, in one list. */
export function flat(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false && child !== "");
}

/** New content for a node. */
export function fill(node, ...children) {
  node.replaceChildren(...flat(children));
  return node;
}

/** Text that somebody else wrote: kept apart from ours also where it is written from right to left. */
export function theirs(text, tag = "span") {
  return h(`${tag}.theirs`, null, String(text).replace(TURNING, escaped));
}

/** What a table of ours has for a key that somebody else wrote: "constructor" is in every object, and in no table. */
export function entryOf(table, key) {
  return Object.hasOwn(table, key) ? table[key] : undefined;
}

// Characters that force a direction on what follows them, and controls.
const TURNING = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;
// The same, and what cannot be seen, or turns its neighbours around.
const UNSEEN = /[\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|\udb40[\udc00-\udc7f]/g;

function escaped(text) {
  return Array.from({ length: text.length }, (_, index) => `\\u${text.charCodeAt(index).toString(16).padStart(4, "0")}`).join("");
}

/** JSON text in which each character can be seen and none turns others around. It means the same. */
export function visible(json) {
  return json.replace(UNSEEN, escaped);
}

/** JSON text in ASCII without controls: no terminal acts on it when it is pasted. It means the same. */
export function ascii(json) {
  return json.replace(/[^\x20-\x7e]/g, escaped);
}

const SHAPES = {
  success: "M3.5 8.5l3 3 6-7",
  error: "M4 4l8 8M12 4l-8 8",
  task_failed: "M4 4l8 8M12 4l-8 8",
  running: "M6 4l6 4-6 4z",
  scheduling: "M8 4v4l2.5 2M14 8A6 6 0 1 1 2 8a6 6 0 0 1 12 0z",
  cancelled: "M3.8 3.8l8.4 8.4M14 8A6 6 0 1 1 2 8a6 6 0 0 1 12 0z",
  retry: "M13 5.5A5.6 5.6 0 1 0 13.6 9M13.5 2.5v3.3h-3.3",
  search: "M11.5 7A4.5 4.5 0 1 1 2.5 7a4.5 4.5 0 0 1 9 0zM10.4 10.400L14 14",
  pause: "M5.5 3.500v9M10.5 3.500v9",
  play: "M5 3.500l7 4.5-7 4.500z",
  copy: "M6 6h7v8H6zM10 3.500V2H3v8h1.5",
  file: "M4 2h5l3 3v9H4zM9 2v3h3",
  key: "M8.3 7.700L14 2M11.5 4.500l2 2M9 10.500A3.2 3.2 0 1 1 2.6 10.500a3.2 3.2 0 0 1 6.4 0z",
  machine: "M2 3h12v8H2zM6 14h4M8 11v3",
  back: "M10 3L5 8l5 5",
  next: "M6 3l5 5-5 5",
  warn: "M8 2.500L14.5 13.500h-13zM8 6.500v3.200M8 11.600v.1",
  info: "M14 8A6 6 0 1 1 2 8a6 6 0 0 1 12 0zM8 7.300v3.700M8 4.900v.1",
  up: "M8 13V3.500M4 7l4-4 4 4",
  down: "M8 3v9.500M4 9l4 4 4-4",
  close: "M4 4l8 8M12 4l-8 8",
  plus: "M8 3v10M3 8h10",
  eye: "M1.5 8S4 3.5 8 3.5 14.5 8 14.5 8 12 12.5 8 12.5 1.5 8 1.5 8zM10 8a2 2 0 1 1-4 0 2 2 0 0 1 4 0z",
};

/** A drawing beside words; it says nothing by itself. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", `icon icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", SHAPES[name]);
  svg.append(path);
  return svg;
}

/** A state in words and colour; `like` is a run's status that looks as it should. */
export function status(name, like = name) {
  return h(`span.status.is-${Object.hasOwn(SHAPES, like) ? like : "cancelled"}`, null, Object.hasOwn(SHAPES, like) ? icon(like) : null, h("span", null, name));
}

export const REASONS = {
  assigned: "Assigned, not started yet",
  waiting_for_machine: "Waits for a free machine",
  machine_offline: "Its machine is offline",
  machine_busy: "Its machine is busy",
  machine_not_responding: "Its machine does not respond",
  no_machine_in_pools: "No machine is in all its pools",
  waiting_for_session: "Waits for its turn in the session",
  not_before: "Is held until its start time",
};

export function reason(code) {
  return entryOf(REASONS, code) ?? String(code).replaceAll("_", " ");
}

// --- ids ---------------------------------------------------------------------------------------------------------------

export const UUID = /^[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}$/i;

/** Enough of an id to tell it apart; the whole is in the title. */
export function short(id) {
  return h("span.id", { title: id }, String(id).slice(0, 8));
}

// --- times ------------------------------------------------------------------------------------------------------------

let skew = 0; // how far the service's clock is ahead of ours, in ms

/** The service's Date header, so that ages are right on a machine whose clock is wrong. */
export function hearDate(header) {
  const offset = Date.parse(header ?? "") - Date.now();
  skew = Math.abs(offset) > 2500 ? offset : 0;
}

/** Now, by the service's clock. */
export function now() {
  return Date.now() + skew;
}

/** "4 s", "12 min", "3 h 20 min", "5 d". */
export function span(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return minutes < 10 && seconds % 60 ? `${minutes} min ${seconds % 60} s` : `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return hours < 10 && minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return `${Math.floor(hours / 24)} d`;
}

/** One unit only, for columns. */
function brief(ms) {
  return span(ms).replace(/^(\d+ (min|h)) .*/, "$1");
}

/** How long something took, with tenths of a second below 10 s. */
export function took(ms) {
  if (ms < 100) return "less than 0.1 s";
  return ms < 10_000 ? `${(ms / 1000).toFixed(1)} s` : span(ms);
}

/** A time as every screen writes it, in the zone that zone() names. */
export function clock(at) {
  return new Date(at).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
}

/** The same to the minute; without the day if that is today. */
export function minute(at) {
  const isToday = new Date(at).toDateString() === new Date(now()).toDateString();
  return new Date(at).toLocaleString(undefined, isToday ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" });
}

/** The browser's time zone, as "Europe/Berlin (UTC+01:00)". */
export function zone() {
  const offset = -new Date(now()).getTimezoneOffset();
  const [hours, minutes] = [Math.floor(Math.abs(offset) / 60), Math.abs(offset) % 60].map((part) => String(part).padStart(2, "0"));
  const name = Intl.DateTimeFormat().resolvedOptions().timeZone;
  return offset || name !== "UTC" ? `${name} (UTC${offset < 0 ? "-" : "+"}${hours}:${minutes})` : "UTC";
}

/** For the title of a time. */
export function utc(at) {
  return `${new Date(at).toISOString().slice(0, 19).replace("T", " ")} UTC`;
}

/** A time that is written out; UTC stands in its title. `form` is clock or minute. */
export function timestamp(at, form = clock) {
  return h("time", { datetime: at, title: utc(at) }, form(at));
}

const AGES = {
  age: (at) => brief(now() - at),
  ago: (at) => (now() - at < 1000 ? "now" : `${brief(now() - at)} ago`),
  since: (at) => span(now() - at),
  when: (at) => (at > now() + 999 ? `in ${span(at - now())}` : "now"),
  left: (at) => (at > now() ? `${span(at - now())} left` : "expired"),
};

/** A time that stays true while it is on the screen; `form` is one of AGES. */
export function time(at, form = "ago") {
  if (!at) return h("span.faint", null, "–");
  const node = h("time", { datetime: at, title: `${clock(at)}\n${utc(at)}`, "data-form": form });
  node.textContent = AGES[form](Date.parse(at));
  return node;
}

/** An ISO time as a datetime-local input has it. */
export function local(iso) {
  if (!iso) return "";
  const at = new Date(iso);
  return new Date(at - at.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}

/** Called once a second. */
export function tick() {
  for (const node of document.querySelectorAll("time[data-form]")) {
    const text = AGES[node.dataset.form](Date.parse(node.dateTime));
    if (node.textContent !== text) node.textContent = text;
  }
}

const SILENT_MS = 180_000;

/** For a running run whose executor is silent: {time, isAmber}. Amber if more reports are expected of it. */
export function silent(run) {
  if (run.status !== "running" || run.is_reporting === undefined) return null;
  const last = run.last_report_at ?? run.started_at;
  return last && now() - Date.parse(last) > SILENT_MS ? { time: time(last, "since"), isAmber: run.is_reporting } : null;
}

// --- numbers ----------------------------------------------------------------------------------------------------------

export function bytes(size) {
  if (size < 1024) return `${size} B`;
  for (const unit of ["KiB", "MiB", "GiB"]) {
    size /= 1024;
    if (size < 1024 || unit === "GiB") return `${size < 10 ? size.toFixed(1) : Math.round(size)} ${unit}`;
  }
}

export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString()} ${number === 1 ? one : many}`;
}

// --- what is said -----------------------------------------------------------------------------------------------------

const said = h("div.unseen", { role: "status", "aria-live": "polite" });
const toasts = h("div.toasts");

export function installVoice() {
  document.body.append(said, toasts);
}

/** For screen readers. */
export function say(text) {
  said.textContent = text;
}

/** Nothing that was said stays on the page. */
export function hush() {
  fill(said);
  fill(toasts);
}

/** For everybody, for a while. */
export function toast(text, kind = "") {
  say(text);
  const node = h(`p.toast${kind ? `.${kind}` : ""}`, null, kind === "bad" ? icon("warn") : icon("success"), text);
  toasts.append(node);
  // In front of an open dialog too.
  if (toasts.showPopover) {
    toasts.popover = "manual";
    if (toasts.matches(":popover-open")) toasts.hidePopover();
    toasts.showPopover();
  }
  setTimeout(() => node.remove(), 6000);
}

/** To the clipboard; without one (the page came over plain http) the text is shown, selected. */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`${what} copied`);
  } catch {
    const area = h("textarea.code", { readonly: true, rows: 12, "aria-label": what });
    area.value = text;
    openDialog({ title: `Copy ${what}`, body: [h("p", null, "This browser lets the page not write to the clipboard. Copy it by hand:"), area] });
    area.select();
  }
}

export function copyButton(text, what, label) {
  return h("button.quiet", { type: "button", title: `Copy ${what}`, "aria-label": label ? null : `Copy ${what}`, onclick: () => copy(text(), what) }, icon("copy"), label);
}

// --- states of a screen -----------------------------------------------------------------------------------------------

/** Nothing to see, and why; `kind` is a word for the drawing: info, warn. */
export function notice(kind, title, ...more) {
  return h(`div.notice.is-${kind}`, null, icon(kind), h("div", null, h("h2", null, title), more));
}

/** What will come has this shape. */
export function skeleton(lines) {
  return h("div.skeleton", { "aria-hidden": "true" }, Array.from({ length: lines }, () => h("i")));
}

// --- dialogs ----------------------------------------------------------------------------------------------------------

/** A native modal dialog that is gone when it is closed. `guard` may refuse to close it. */
export function openDialog({ title, body, foot, className = "", guard, closed }) {
  const heading = `dialog-${Math.random().toString(36).slice(2)}`;
  const close = () => {
    if (!guard || guard()) dialog.close();
  };
  const dialog = h(
    `dialog${className ? `.${className}` : ""}`,
    { "aria-labelledby": heading },
    h("header", null, h("h2", { id: heading, tabindex: -1 }, title), h("button.quiet", { type: "button", "aria-label": "Close", onclick: close }, icon("close"))),
    h("div.body", null, body),
    foot ? h("footer", null, foot) : null,
  );
  dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    close();
  });
  dialog.addEventListener("close", () => {
    closed?.();
    dialog.remove();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/**
 * Takes the open dialogs off the page, without their secrets, and returns them for showAgain(). Each hears "park", and "back" when it
 * is shown again.
 */
export function park() {
  const dialogs = [...document.querySelectorAll("dialog[open]")];
  for (const dialog of dialogs) {
    for (const secret of dialog.querySelectorAll("[data-secret]")) secret.value = "";
    dialog.dispatchEvent(new Event("park"));
    dialog.remove();
    dialog.removeAttribute("open"); // close() of a view that goes does nothing now
  }
  return dialogs;
}

export function showAgain(dialogs) {
  for (const dialog of dialogs) {
    document.body.append(dialog);
    dialog.showModal();
    dialog.dispatchEvent(new Event("back"));
  }
}

/** Runs `render` only when what it shows has changed, so that focus, selection and scrolling stay. */
export function keeping(node) {
  let before;
  return (shown, render) => {
    const text = JSON.stringify(shown);
    if (text === before) return false;
    before = text;
    fill(node, render());
    return true;
  };
}

/** Only while it cannot be undone: moves along with the pointer of whoever drags. */
export function bar(share, kind = "") {
  return h(`span.bar${kind ? `.${kind}` : ""}`, { vars: { "--share": `${Math.max(0, Math.min(1, share)) * 100}%` } });
}
