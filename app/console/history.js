// What was said and done in a run, in whatever form the executor's model has: text, pictures, tool calls and their results.
// What is not understood is shown as JSON, and nothing is left out.

import { fill, flat, h, icon, openDialog, theirs, visible } from "./dom.js";

const FIRST = 60; // messages drawn at once, the latest
const MORE = 500; // that are drawn when more are asked for
const PIECE = 60; // parts of a message drawn at once
const LONG = 4000; // characters of a text before it is folded
const LONGER = 200_000; // characters that are drawn when more are asked for
const STRIP = 12; // pictures of the strip that are decoded at once
const BASE64 = /^[A-Za-z0-9+/\s]+={0,2}\s*$/;
const PICTURES = /^image\/(png|jpeg|gif|webp)$/;

/**
 * The messages of a run, the latest last. `story` is {from, total, messages}: those from `from` on; `load(from)` adds earlier ones
 * to it.
 */
export function historyView(story, load) {
  let begin = Math.max(story.from, story.total - FIRST);
  const list = h("ol.history", { start: begin + 1 });
  const drawn = (from, end) => story.messages.slice(from - story.from, end - story.from).map((message, index) => safely(() => entry(message, from + index), message, "li.other"));
  fill(list, drawn(begin, story.total));
  if (!begin) return list;
  const more = h("button", { type: "button" });
  const label = () => fill(more, `Show the ${Math.min(begin, MORE).toLocaleString()} before`, begin > MORE ? ` of ${begin.toLocaleString()}` : "");
  label();
  more.addEventListener("click", async () => {
    const from = Math.max(0, begin - MORE);
    if (from < story.from) {
      if (more.disabled) return;
      more.disabled = true;
      fill(more, "Loading …");
      try {
        await load(from);
      } catch (error) {
        label();
        more.after(h("span.error", { role: "alert" }, error.message));
        return;
      } finally {
        more.disabled = false;
      }
    }
    list.prepend(...drawn(from, begin));
    begin = from;
    list.start = begin + 1;
    list.firstElementChild.tabIndex = -1;
    list.firstElementChild.focus();
    if (begin) label();
    else more.remove();
  });
  return h("div", null, more, list);
}

/** What `draw` makes of a value; if it fails at it, the value as JSON: an executor may report anything. */
export function safely(draw, value, tag = "div") {
  try {
    return draw();
  } catch {
    return h(tag, null, h("p.faint", null, icon("warn"), "This has a form that the console does not know. As JSON:"), json(value));
  }
}

/** The first of many things, in an element if `tag` is given, and a button for the next ones: thousands at once freeze the page. */
export function inPieces(items, draw, tag) {
  const first = items.slice(0, PIECE).map(draw);
  const list = tag && h(tag, null, first);
  let shown = PIECE;
  if (items.length <= shown) return list ?? first;
  const more = h("button.quiet", { type: "button" });
  const label = () => fill(more, `Show ${Math.min(MORE, items.length - shown).toLocaleString()} more of ${items.length.toLocaleString()}`);
  label();
  more.addEventListener("click", () => {
    const next = flat(items.slice(shown, shown + MORE).map(draw));
    if (list) list.append(...next);
    else more.before(...next);
    shown += MORE;
    if (shown < items.length) label();
    else more.remove();
  });
  return [list ?? first, more];
}

function entry(message, index) {
  const role = typeof message.role === "string" ? message.role : typeof message.type === "string" ? message.type : "message";
  const { role: _role, content, tool_calls: calls, ...rest } = message;
  const known = content !== undefined || Array.isArray(calls);
  const parts = known
    ? [blocks(content, index), Array.isArray(calls) ? inPieces(calls, (made) => safely(() => openAiCall(made), made)) : null, Object.keys(rest).length ? h("details.more", null, h("summary", null, "More of this message"), json(rest)) : null]
    : [json(message)];
  return h(`li.${["user", "assistant", "system", "tool"].includes(role) ? role : "other"}`, null, h("span.role", null, theirs(role.slice(0, 60))), h("div.said", null, parts));
}

function blocks(content, index) {
  if (content === null || content === undefined) return null;
  if (typeof content === "string") return prose(content);
  if (!Array.isArray(content)) return block(content, index);
  return inPieces(content, (item) => safely(() => block(item, index), item));
}

function block(item, index) {
  if (typeof item === "string") return prose(item);
  if (item === null || typeof item !== "object") return json(item);
  if (typeof item.text === "string" && /^(input_|output_)?text$/.test(item.type ?? "text")) return prose(item.text);
  if (typeof item.thinking === "string") return h("details.more", null, h("summary", null, "Thinking"), prose(item.thinking));
  if (/^(tool_use|tool_call|function_call)$/.test(item.type)) return call(item.name, item.input ?? item.arguments ?? item.args);
  if (/^(tool_result|function_call_output)$/.test(item.type)) {
    return h(`div.result${item.is_error ? ".failed" : ""}`, null, h("span.role", null, item.is_error ? "Failed" : "Result"), blocks(item.content ?? item.output, index));
  }
  return picture(item, index) ?? json(item);
}

function openAiCall(made) {
  return call(made?.function?.name ?? made?.name, made?.function?.arguments ?? made?.args ?? made?.arguments);
}

function call(name, input) {
  let shown = input;
  if (typeof input === "string") {
    try {
      shown = JSON.parse(input);
    } catch {
      // it is shown as the text it is
    }
  }
  return h("div.call", null, h("span.role", null, icon("play"), theirs(typeof name === "string" ? name.slice(0, 200) : "tool")), typeof name === "string" || name === undefined ? null : json(name), shown === undefined ? null : json(shown));
}

/** Type and base64 of a picture, in the forms in which models' vendors send them; a text where it is, if that is another host. */
function imageOf(item) {
  const source = item.source ?? item;
  const url = typeof item.image_url === "string" ? item.image_url : (item.image_url?.url ?? source.url);
  if (typeof url === "string") {
    const inline = /^data:([a-z/]+);base64,/.exec(url);
    if (!inline) return /^https?:/.test(url) ? url : null;
    return PICTURES.test(inline[1]) ? { type: inline[1], data: url.slice(inline[0].length) } : null;
  }
  const type = source.media_type ?? source.mime_type ?? source.mimeType;
  return typeof source.data === "string" && PICTURES.test(type) ? { type, data: source.data } : null;
}

/** Raises if it is no base64. */
function blobOf({ type, data }) {
  return new Blob([Uint8Array.from(atob(data), (character) => character.charCodeAt(0))], { type });
}

function picture(item, index) {
  const found = imageOf(item);
  if (!found) return null;
  if (typeof found === "string") return h("p.faint", null, icon("file"), "A picture at ", theirs(found.slice(0, 300)), ": not loaded, because the console asks no other host.");
  return thumbnail([{ index, ...found }], 0);
}

/** All pictures of a history, in its order: {index of the message, type, data}. */
export function picturesOf(messages, from) {
  const found = [];
  const look = (item, index, depth) => {
    if (item === null || typeof item !== "object" || depth > 6) return;
    if (Array.isArray(item)) {
      for (const one of item) look(one, index, depth + 1);
      return;
    }
    const image = imageOf(item);
    if (image && typeof image === "object" && BASE64.test(image.data)) found.push({ index, ...image });
    else for (const part of [item.content, item.output]) look(part, index, depth + 1);
  };
  messages.forEach((message, index) => {
    try {
      look(message?.content ?? message, from + index, 0);
    } catch {
      // a form that the console does not know: the history shows it as JSON
    }
  });
  return found;
}

/** One of these pictures, small; pressed, it is shown large, with the others before and after it. */
export function thumbnail(pictures, at) {
  const label = `Picture in message ${pictures[at].index + 1}`;
  try {
    return h("button.picture", { type: "button", "aria-label": `${label}, enlarge`, onclick: () => enlarge(pictures, at) }, drawn(blobOf(pictures[at]), label));
  } catch {
    return h("p.faint", null, icon("warn"), "A picture that cannot be read.");
  }
}

function enlarge(pictures, at) {
  const body = h("div");
  const step = (by, label, drawing) => h("button", { type: "button", onclick: () => show(at + by) }, icon(drawing), label);
  const [earlier, later] = [step(-1, "Earlier", "back"), step(1, "Later", "next")];
  const where = h("span.faint");
  const show = (wanted) => {
    at = wanted;
    const label = `Picture in message ${pictures[at].index + 1}`;
    try {
      fill(body, drawn(blobOf(pictures[at]), label));
    } catch {
      fill(body, h("p.faint", null, icon("warn"), "A picture that cannot be read."));
    }
    dialog.querySelector("h2").textContent = label;
    fill(where, `${at + 1} of ${pictures.length}`);
    [earlier.disabled, later.disabled] = [at === 0, at === pictures.length - 1];
  };
  const dialog = openDialog({ title: "Picture", className: "wide", body, foot: pictures.length > 1 ? [earlier, later, where] : null });
  dialog.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && pictures[at + by]) show(at + by);
  });
  show(at);
}

/** The pictures side by side, the latest first; only some are decoded at once. */
export function strip(pictures) {
  if (pictures.length < 2) return null;
  const latest = pictures.map((_, index) => pictures.length - 1 - index);
  let shown = STRIP;
  const row = h("div.strip", { role: "group", "aria-label": "Pictures, the latest first", tabindex: 0 }, latest.slice(0, shown).map((at) => thumbnail(pictures, at)));
  if (latest.length > shown) {
    const more = h("button", { type: "button" }, `${latest.length - shown} earlier`);
    more.addEventListener("click", () => {
      more.before(...latest.slice(shown, shown + STRIP).map((at) => thumbnail(pictures, at)));
      shown += STRIP;
      if (shown < latest.length) fill(more, `${latest.length - shown} earlier`);
      else more.remove();
    });
    row.append(more);
  }
  return row;
}

/** The last picture among messages; null if there is none that can be shown. */
export function lastPicture(messages) {
  const pictures = picturesOf(messages);
  return pictures.length ? thumbnail(pictures, pictures.length - 1) : null;
}

function drawn(blob, alt) {
  const url = URL.createObjectURL(blob);
  const done = () => URL.revokeObjectURL(url);
  const image = h("img", { alt, onload: done, onerror: () => (done(), image.replaceWith(h("span.faint", null, "A picture that cannot be shown."))) });
  image.src = url;
  return image;
}

/** Text as it was written, folded if it is long. What is no text is shown as JSON. */
export function prose(text) {
  if (typeof text !== "string") return json(text);
  return text.length <= LONG ? theirs(text, "p") : unfolding(theirs(`${text.slice(0, LONG)}…`, "p"), text, LONG, (part) => theirs(part).textContent);
}

/** The node, and a button that shows more of its text: all, or as much as a browser draws at once. */
function unfolding(node, text, shown, drawn) {
  const more = h("button.quiet", { type: "button" });
  const label = () =>
    fill(more, text.length - shown <= LONGER ? `Show all ${text.length.toLocaleString()} characters` : `Show ${LONGER.toLocaleString()} more of ${text.length.toLocaleString()} characters`);
  label();
  more.addEventListener("click", () => {
    shown = Math.min(text.length, shown + LONGER);
    const rest = shown < text.length ? "…" : "";
    fill(node, drawn(text.slice(0, shown)) + rest);
    if (rest) label();
    else more.remove();
  });
  return [node, more];
}

const COLOURED = 20_000; // characters: beyond, JSON is one plain text

/** JSON as it came, indented. */
export function json(value, label = "JSON") {
  const text = visible(indented(value));
  const node = h("pre.code", { tabindex: 0, role: "group", "aria-label": label });
  if (text.length <= COLOURED) return fill(node, coloured(text));
  node.classList.add("plain");
  if (text.length <= LONGER) return fill(node, text);
  fill(node, text.slice(0, LONGER));
  return h("div", null, unfolding(node, text, LONGER, (part) => part));
}

/** On one line if it is a short one. In JSON text, line breaks stand between values only. */
function indented(value) {
  const text = JSON.stringify(value, null, 2) ?? "null";
  const line = text.length < 200 ? text.replace(/\n\s*/g, " ") : text;
  return line.length <= 90 ? line : text;
}

const TOKENS = /("(?:[^"\\]|\\.)*")(\s*:)?|(-?\d[\d.eE+-]*)|(true|false|null)/g;

function coloured(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(TOKENS)) {
    nodes.push(text.slice(end, match.index));
    const kind = match[1] ? (match[2] ? "key" : "string") : match[3] ? "number" : "word";
    nodes.push(h(`span.j-${kind}`, null, match[1] ?? match[0]), match[2] ?? "");
    end = match.index + match[0].length;
  }
  nodes.push(text.slice(end));
  return nodes;
}
