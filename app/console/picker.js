// A field that finds one of many by typing: the names that are known at once, and those that the service finds among all.

import { aborted } from "./api.js";
import { fill, h, say, short, theirs } from "./dom.js";
import * as names from "./names.js";

const QUIET_MS = 200; // after the last key
const SHOWN = 20;
let serial = 0;

/**
 * A field for a workflow or a machine. `picked(id)` is called with the chosen one, or "" for any; `unpicked(text)` when the field is
 * left with a text that chooses none.
 */
export function picker({ kind, label, any, picked, unpicked }) {
  const id = `picker-${++serial}`;
  const input = h("input", {
    type: "search",
    role: "combobox",
    "aria-label": label,
    "aria-autocomplete": "list",
    "aria-expanded": "false",
    "aria-controls": id,
    placeholder: any,
    autocomplete: "off",
    spellcheck: "false",
    maxlength: 200,
  });
  const list = h("ul", { id, role: "listbox", "aria-label": label });
  const note = h("p.faint");
  const popup = h("div.popup", { hidden: true }, list, note);
  const node = h("div.picker", null, input, popup);
  let chosen = "";
  let items = []; // what the list shows: {id, name}
  let active = -1;
  let asking = null;
  let timer = 0;

  const chosenName = () => (chosen ? names.nameOf(kind, chosen) : "");

  function open() {
    popup.hidden = false;
    input.setAttribute("aria-expanded", "true");
    look();
  }

  function close() {
    popup.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
    clearTimeout(timer);
    asking?.abort();
  }

  /** Shows what is known of the text at once, and what the service finds a moment later. */
  function look() {
    const text = input.value.trim();
    const wanted = text === chosenName() ? "" : text.toLowerCase();
    draw(known(wanted), "");
    clearTimeout(timer);
    asking?.abort();
    if (wanted) timer = setTimeout(() => ask(text), QUIET_MS);
  }

  function known(wanted) {
    const all = names.all(kind).map((item) => ({ id: item.id, name: names.nameOf(kind, item.id) }));
    const found = all.filter((item) => item.name.toLowerCase().includes(wanted) || item.id.startsWith(wanted));
    return found.sort((one, other) => one.name.localeCompare(other.name));
  }

  async function ask(text) {
    const abort = (asking = new AbortController());
    try {
      const found = await names.find(kind, text, abort.signal);
      if (asking !== abort || popup.hidden) return;
      const shown = known(text.toLowerCase());
      const ids = new Set(shown.map((item) => item.id));
      const more = found.items.filter((item) => !ids.has(item.id)).map((item) => ({ id: item.id, name: names.nameOf(kind, item.id) }));
      draw([...shown, ...more], found.total > found.items.length ? `${found.total.toLocaleString()} have this text: type more of it.` : "");
      say(items.length ? `${Math.max(found.total, items.length).toLocaleString()} found` : "None found");
    } catch (error) {
      if (!aborted(error) && asking === abort) fill(note, error.message);
    }
  }

  function draw(found, more) {
    items = [...(chosen ? [{ id: "", name: any }] : []), ...found.slice(0, SHOWN)];
    active = -1;
    input.removeAttribute("aria-activedescendant");
    const isAsking = !more && input.value.trim() && !found.length;
    fill(note, more || (found.length > SHOWN ? `and ${(found.length - SHOWN).toLocaleString()} more: type a part of the name.` : isAsking ? "No name or id has this text." : ""));
    fill(
      list,
      items.map((item, index) =>
        h(
          "li",
          { role: "option", id: `${id}-${index}`, "aria-selected": "false", onpointerdown: (event) => (event.preventDefault(), pick(item)) },
          theirs(item.name),
          item.id ? short(item.id) : null,
        ),
      ),
    );
  }

  function move(by) {
    if (!items.length) return;
    list.children[active]?.setAttribute("aria-selected", "false");
    active = (active + by + items.length + (active < 0 && by < 0 ? 1 : 0)) % items.length;
    const option = list.children[active];
    option.setAttribute("aria-selected", "true");
    option.scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", option.id);
  }

  function pick(item) {
    close();
    own.set(item.id);
    input.select();
    picked(item.id);
  }

  input.addEventListener("focus", () => {
    input.select();
    open();
  });
  input.addEventListener("click", () => popup.hidden && open());
  input.addEventListener("input", () => {
    input.removeAttribute("aria-invalid");
    if (popup.hidden) open();
    else look();
    if (!input.value && chosen) pick({ id: "" });
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (popup.hidden) open();
      move(event.key === "ArrowDown" ? 1 : -1);
    } else if (event.key === "Enter") {
      event.preventDefault();
      const real = items.filter((item) => item.id);
      if (active >= 0) pick(items[active]);
      else if (real.length === 1 && input.value.trim()) pick(real[0]);
      else move(1);
    } else if (event.key === "Escape" && !popup.hidden) {
      event.stopPropagation();
      event.preventDefault();
      input.value = chosenName();
      close();
    }
  });
  input.addEventListener("blur", () => {
    close();
    const text = input.value.trim();
    if (text && text !== chosenName()) {
      input.setAttribute("aria-invalid", "true");
      unpicked(text);
    } else own.set(chosen);
  });

  const own = {
    node,
    /** Shows this one; names arrive later than ids. */
    set(wanted) {
      const same = wanted === chosen;
      chosen = wanted;
      if (document.activeElement === input && same) return;
      if (same && input.getAttribute("aria-invalid")) return;
      input.removeAttribute("aria-invalid");
      input.value = chosenName();
    },
  };
  return own;
}
