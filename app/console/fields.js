// The fields of a retry: each is kept, changed or emptied. A field knows its part of the request, checks it, and marks what the
// service refuses in it. Secrets are typed here, sent once, and wiped when the dialog closes.

import { LIMITS, parse } from "./api.js";
import { UUID, bytes, count, fill, h, icon, local, now, short, theirs, time } from "./dom.js";
import * as names from "./names.js";

let serial = 0;

/**
 * What all fields share: a legend, the choice, what stands there now, and a place for an error. `keys` are the names in the request
 * for which it answers; `changed()` is called after every change.
 */
function field({ legend, keys, choices, words, change, changed }) {
  const id = `field-${++serial}`;
  const error = h("p.error", { id: `${id}-error`, role: "alert" });
  const note = h("p.note");
  const panel = h("div.change", { hidden: true }, change);
  const radios = {};
  const segments = h(
    "div.segments",
    null,
    Object.entries(choices).map(([mode, label]) => {
      radios[mode] = h("input", { type: "radio", name: id, value: mode, checked: mode === "keep", onchange: () => (show(), changed()) });
      return h("label", null, radios[mode], h("span", null, label));
    }),
  );
  const node = h("fieldset.field", { "aria-describedby": error.id }, h("legend", null, legend), segments, note, panel, error);
  const own = {
    node,
    keys,
    get mode() {
      return Object.entries(radios).find(([, radio]) => radio.checked)[0];
    },
    set(mode) {
      radios[mode].checked = true;
      show();
    },
    /** Marks it; `at` is the control to go to. */
    refuse(message, at) {
      fill(error, message);
      node.classList.add("refused");
      const control = at ?? (panel.hidden ? radios[own.mode] : panel.querySelector("input, textarea, select")) ?? radios[own.mode];
      control.setAttribute("aria-invalid", "true");
      control.setAttribute("aria-describedby", error.id);
      return control;
    },
    clear() {
      if (!node.classList.contains("refused")) return;
      node.classList.remove("refused");
      fill(error);
      for (const control of node.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
    },
    check: () => null,
    wipe() {},
    show,
  };
  function show() {
    own.clear();
    panel.hidden = own.mode !== "change";
    const text = words[own.mode];
    fill(note, typeof text === "function" ? text() : text);
  }
  show();
  return own;
}

const TRIPLE = { keep: "Keep", change: "Change", empty: "Empty" };

// --- values -----------------------------------------------------------------------------------------------------------

/** A value as somebody edits it: plain text, or JSON for everything else. */
function valueRow(name, value, changed, removed) {
  const isText = value === undefined || typeof value === "string";
  const key = h("input.name", { type: "text", value: name ?? "", "aria-label": "Name", placeholder: "Name", autocomplete: "off", spellcheck: "false", maxlength: 1000 });
  const kind = h("select", { "aria-label": "Kind of value", onchange: changed }, h("option", { value: "text" }, "Text"), h("option", { value: "json" }, "JSON"));
  kind.value = isText ? "text" : "json";
  const area = h("textarea", { rows: 1, "aria-label": name ? `Value of ${name}` : "Value", autocomplete: "off", spellcheck: "false" });
  area.value = isText ? (value ?? "") : JSON.stringify(value, null, 1).replace(/\n\s*/g, " ");
  const remove = h("button.quiet", { type: "button", "aria-label": `Remove ${name || "this value"}`, onclick: () => removed(row) }, icon("close"));
  const row = {
    node: h("div.row", null, key, kind, area, remove),
    key,
    area,
    get name() {
      return key.value;
    },
    /** Raises SyntaxError. */
    value: () => (kind.value === "text" ? area.value : parse(area.value)),
  };
  return row;
}

/** `stays` says what is kept, if that is not the run's own. */
export function valuesField(run, changed, stays) {
  const rows = [];
  const list = h("div.rows");
  const add = (name, value) => {
    const row = valueRow(name, value, changed, (gone) => {
      rows.splice(rows.indexOf(gone), 1);
      gone.node.remove();
      adder.focus();
      changed();
    });
    rows.push(row);
    list.append(row.node);
    return row;
  };
  const adder = h("button.quiet", { type: "button", onclick: () => (add().key.focus(), changed()) }, icon("plus"), "Add a value");
  const present = Object.keys(run.input_values ?? {});
  for (const [name, value] of Object.entries(run.input_values ?? {})) add(name, value);
  const own = field({
    legend: "Values",
    keys: ["input_values"],
    choices: TRIPLE,
    words: {
      keep: stays ?? (present.length ? ["Stay: ", present.slice(0, 12).map((name, index) => [index ? ", " : "", theirs(name)]), present.length > 12 ? ` and ${present.length - 12} more` : ""] : "There are none."),
      change: "What stands here replaces all values.",
      empty: "The next attempt has no values.",
    },
    change: [list, adder],
    changed,
  });
  return Object.assign(own, {
    check() {
      if (own.mode !== "change") return null;
      const seen = new Set();
      for (const row of rows) {
        if (!row.name) return own.refuse("Every value needs a name.", row.key);
        if (seen.has(row.name)) return own.refuse(`“${row.name}” is there twice.`, row.key);
        seen.add(row.name);
        try {
          row.value();
        } catch {
          return own.refuse(`“${row.name}” is not valid JSON. Texts in JSON stand in double quotes; or choose Text.`, row.area);
        }
      }
      return null;
    },
    put(body) {
      // fromEntries, not assignment: a value may be called __proto__.
      if (own.mode === "change") body.input_values = Object.fromEntries(rows.map((row) => [row.name, row.value()]));
      if (own.mode === "empty") body.input_values = {};
    },
    dirty: () => own.mode !== "keep",
  });
}

// --- secrets ----------------------------------------------------------------------------------------------------------

/** A secret's input. It is one masked line, until something with several lines is pasted: those would lose their line breaks. */
function secretRow({ name, isJson, fixed, changed, removed }) {
  const id = `secret-${++serial}`;
  const attributes = { autocomplete: "off", autocapitalize: "off", spellcheck: "false", "data-secret": "" };
  let input = h("input", { type: "password", id, ...attributes, autocomplete: "new-password" });
  const key = fixed ? null : h("input.name", { type: "text", "aria-label": "Name of the secret", placeholder: "Name", autocomplete: "off", spellcheck: "false", maxlength: 1000 });
  const kind = fixed ? null : h("select", { "aria-label": "Kind of secret", onchange: changed }, h("option", { value: "text" }, "Text"), h("option", { value: "json" }, "JSON"));
  const eye = h("button.quiet", {
    type: "button",
    "aria-pressed": "false",
    "aria-label": `Show ${name ?? "the secret"}`,
    onclick: () => {
      const shown = eye.getAttribute("aria-pressed") !== "true";
      eye.setAttribute("aria-pressed", String(shown));
      if (input.tagName === "INPUT") input.type = shown ? "text" : "password";
      else input.classList.toggle("masked", !shown);
    },
  }, icon("eye"));
  const label = fixed ? h("label", { htmlFor: id }, icon("key"), theirs(name), isJson ? h("span.tag", null, "JSON") : null) : null;
  const remove = fixed ? null : h("button.quiet", { type: "button", "aria-label": "Remove this secret", onclick: () => removed(row) }, icon("close"));
  if (!fixed) input.setAttribute("aria-label", "Secret");
  input.addEventListener("paste", (event) => {
    const pasted = event.clipboardData?.getData("text/plain") ?? "";
    if (!pasted.trim().includes("\n")) return;
    event.preventDefault();
    const area = h("textarea.masked", { id, rows: 3, ...attributes, "aria-label": fixed ? `${name}, several lines` : "Secret, several lines" });
    if (eye.getAttribute("aria-pressed") === "true") area.classList.remove("masked");
    area.value = pasted;
    input.value = "";
    input.replaceWith(area);
    input = area;
    area.focus();
    changed();
  });
  const row = {
    node: h("div.row.secret", null, label ?? key, kind, input, eye, remove),
    key,
    get input() {
      return input;
    },
    get name() {
      return fixed ? name : key.value;
    },
    /** Raises SyntaxError. */
    value: () => (isJson || kind?.value === "json" ? parse(input.value) : input.value),
    wipe() {
      input.value = "";
    },
  };
  return row;
}

export function secretsField(run, plan, changed) {
  const aliases = Object.entries(run.sensitive_input_aliases ?? {});
  const rows = aliases.map(([name, alias]) => secretRow({ name, isJson: String(alias).startsWith("vault+json:"), fixed: true, changed }));
  const list = h("div.rows", null, rows.map((row) => row.node));
  const adder = h("button.quiet", {
    type: "button",
    onclick: () => {
      const row = secretRow({
        changed,
        removed(gone) {
          gone.wipe();
          rows.splice(rows.indexOf(gone), 1);
          gone.node.remove();
          adder.focus();
          changed();
        },
      });
      rows.push(row);
      list.append(row.node);
      row.key.focus();
      changed();
    },
  }, icon("plus"), "Add a secret");
  const until = plan?.secrets?.kept_until;
  const own = field({
    legend: "Secrets",
    keys: ["sensitive_input_values"],
    choices: TRIPLE,
    words: {
      keep: aliases.length ? ["Stay: ", aliases.map(([name], index) => [index ? ", " : "", theirs(name)]), until ? [" (", time(until, "left"), ")"] : ""] : "There are none.",
      change: aliases.length > 1 ? "A retry replaces all secrets at once, and nobody can read the old ones: type every one of them." : aliases.length ? "What you type replaces it. Nobody can read the old one." : "They go to the secret store; nobody can read them here again.",
      empty: aliases.length ? "The next attempt has no secrets. The old ones are destroyed." : "The next attempt has no secrets.",
    },
    change: [list, adder],
    changed,
  });
  return Object.assign(own, {
    check() {
      if (own.mode !== "change") return null;
      const seen = new Set();
      for (const row of rows) {
        if (!row.name) return own.refuse("Every secret needs a name.", row.key);
        if (seen.has(row.name)) return own.refuse(`“${row.name}” is there twice.`, row.key ?? row.input);
        seen.add(row.name);
        if (!row.input.value) return own.refuse(`“${row.name}” is missing: the whole set is replaced, so each one is needed.`, row.input);
        try {
          row.value();
        } catch {
          return own.refuse(`“${row.name}” must be valid JSON: it is no plain text${row.key ? "; or choose Text" : ""}.`, row.input);
        }
      }
      if (!rows.length) return own.refuse("Add a secret, or choose Keep or Empty.", adder);
      return null;
    },
    put(body) {
      if (own.mode === "change") body.sensitive_input_values = Object.fromEntries(rows.map((row) => [row.name, row.value()]));
      if (own.mode === "empty") body.sensitive_input_values = {};
    },
    /** Names, with `stand` in place of what was typed; nothing while there are none. */
    putNames(body, stand) {
      const named = rows.filter((row) => row.name);
      if (own.mode === "change" && named.length) body.sensitive_input_values = Object.fromEntries(named.map((row) => [row.name, stand]));
      if (own.mode === "empty") body.sensitive_input_values = {};
    },
    dirty: () => own.mode !== "keep",
    wipe: () => rows.forEach((row) => row.wipe()),
  });
}

// --- files ------------------------------------------------------------------------------------------------------------

const base64Length = (size) => 4 * Math.ceil(size / 3);

/** The bytes as base64. Raises if the file has changed or gone since it was picked. */
function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

export function filesField(attachments, changed) {
  const rows = [];
  const list = h("ul.files");
  const total = h("p.note");
  const picker = h("input", { type: "file", multiple: true, class: "unseen", tabindex: -1, "aria-label": "Files to send", onchange: () => (add(picker.files), (picker.value = "")) });
  const choose = h("button", { type: "button", onclick: () => picker.click() }, icon("plus"), "Choose files");
  const drop = h("div.drop", null, choose, picker, h("span.faint", null, "or drop them here. ", `At most ${count(LIMITS.files, "file")} of ${bytes(LIMITS.file)} each.`));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") add(event.dataTransfer.files);
    });
  }

  function add(files) {
    for (const file of files) {
      const path = h("input", { type: "text", "aria-label": `Path on the machine for ${file.name}`, placeholder: "Path on the machine (optional)", autocomplete: "off", spellcheck: "false", maxlength: 4096 });
      const cleanup = h("input", { type: "checkbox" });
      const row = { file, path, cleanup };
      row.node = h(
        "li",
        null,
        icon("file"),
        h("span.grow", null, theirs(file.name)),
        h(`span.faint${file.size > LIMITS.file ? ".bad" : ""}`, null, bytes(file.size)),
        h("button.quiet", { type: "button", "aria-label": `Remove ${file.name}`, onclick: () => (rows.splice(rows.indexOf(row), 1), row.node.remove(), choose.focus(), sum(), changed()) }, icon("close")),
        h("div.more", null, path, h("label.check", null, cleanup, "Delete it there after the run")),
      );
      rows.push(row);
      list.append(row.node);
    }
    sum();
    changed();
    tooLarge();
  }

  function sum() {
    fill(total, rows.length ? `${count(rows.length, "file")}, ${bytes(rows.reduce((size, row) => size + row.file.size, 0))}.` : "No file yet.");
  }

  function tooLarge() {
    const big = rows.find((row) => row.file.size > LIMITS.file);
    if (big) return own.refuse(`“${big.file.name}” has ${bytes(big.file.size)}; a file may have ${bytes(LIMITS.file)}.`, choose);
    if (rows.length > LIMITS.files) return own.refuse(`These are ${rows.length} files; a retry takes ${LIMITS.files}.`, choose);
    const sent = rows.reduce((size, row) => size + base64Length(row.file.size) + 500, 0);
    if (sent > LIMITS.body) return own.refuse(`Together they take ${bytes(sent)} on the wire; a request may have ${bytes(LIMITS.body)}.`, choose);
    return null;
  }

  const own = field({
    legend: "Files",
    keys: ["file_inputs"],
    choices: TRIPLE,
    words: {
      keep: attachments.length
        ? ["Stay: ", attachments.slice(0, 8).map((file, index) => [index ? ", " : "", theirs(file.filename), ` (${bytes(file.size_bytes)}${file.expires_at && Date.parse(file.expires_at) <= now() ? ", expired" : ""})`]), attachments.length > 8 ? ` and ${attachments.length - 8} more` : ""]
        : "There are none.",
      change: "These replace all input files.",
      empty: attachments.length ? "The next attempt has no input files. The old ones are deleted." : "The next attempt has no input files.",
    },
    change: [list, total, drop],
    changed,
  });
  sum();

  const described = (row, content) => ({
    filename: row.file.name,
    content,
    ...(row.path.value ? { target_path: row.path.value } : {}),
    ...(row.cleanup.checked ? { cleanup_imports_after_run: true } : {}),
  });
  return Object.assign(own, {
    check() {
      if (own.mode !== "change") return null;
      if (!rows.length) return own.refuse("Choose a file, or choose Keep or Empty.", choose);
      return tooLarge();
    },
    async put(body) {
      if (own.mode === "empty") body.file_inputs = [];
      if (own.mode !== "change") return;
      body.file_inputs = [];
      for (const row of rows) {
        try {
          body.file_inputs.push(described(row, await read(row.file)));
        } catch {
          throw new FieldError(own.refuse(`“${row.file.name}” cannot be read any more. Choose it again.`, choose));
        }
      }
    },
    putNames(body, stand) {
      if (own.mode === "change" && tooLarge()) throw new FieldError(choose);
      if (own.mode === "change" && rows.length) body.file_inputs = rows.map((row) => described(row, stand));
      if (own.mode === "empty") body.file_inputs = [];
    },
    /** The service's loc goes on with the number of the file and the name of its field. */
    refuseAt([index, part], message) {
      const row = rows[index];
      if (!row) return own.refuse(message);
      return own.refuse(`“${row.file.name}”: ${message}`, part === "target_path" ? row.path : choose);
    },
    dirty: () => own.mode !== "keep",
  });
}

/** A field that could not be read after all; it is marked, and `control` is where to go. */
export class FieldError extends Error {
  constructor(control) {
    super("A field is not ready.");
    this.control = control;
  }
}

// --- machine or pools -------------------------------------------------------------------------------------------------

const SHOWN = 200; // machines or pools in a list; the filter finds the others

function pickList({ kind, label, describe, type, changed }) {
  const group = `pick-${++serial}`;
  const chosen = new Set();
  const filter = h("input", { type: "search", placeholder: `Find ${label.toLowerCase()}`, "aria-label": `Find ${label.toLowerCase()}`, autocomplete: "off", spellcheck: "false", oninput: (event) => (event.stopPropagation(), draw()) });
  const list = h("div.picks", { role: "group", "aria-label": label });
  const node = h("div.pick", null, filter, list);
  function draw() {
    const wanted = filter.value.trim().toLowerCase();
    const all = names.all(kind).map((item) => [names.nameOf(kind, item.id), item]);
    all.sort((one, other) => one[0].localeCompare(other[0]));
    filter.hidden = all.length <= 8;
    const found = all.filter(([name, item]) => chosen.has(item.id) || !wanted || name.toLowerCase().includes(wanted) || item.id.startsWith(wanted));
    fill(
      list,
      found.slice(0, SHOWN).map(([name, item]) =>
        h(
          "label",
          null,
          h("input", {
            type,
            name: group,
            value: item.id,
            checked: chosen.has(item.id),
            onchange: (event) => {
              if (type === "radio") chosen.clear();
              if (event.target.checked) chosen.add(item.id);
              else chosen.delete(item.id);
              changed();
            },
          }),
          theirs(name),
          h("span.faint", null, describe(item)),
        ),
      ),
      found.length ? null : h("p.faint", null, all.length ? "None has this name." : "There are none."),
      found.length > SHOWN ? h("p.faint", null, `and ${found.length - SHOWN} more: narrow it down above`) : null,
    );
  }
  draw();
  return { node, chosen, draw };
}

export function targetField(run, changed) {
  const failed = ["error", "task_failed"].includes(run.status) ? (run.assigned_machine_id ?? run.machine_id) : null;
  const machines = pickList({
    kind: "machines",
    label: "Machines",
    type: "radio",
    changed,
    describe: (machine) => [
      machine.id === failed ? h("span.tag.bad", null, `attempt ${run.attempt} failed here`) : null,
      machine.status !== "connected" ? " offline" : machine.is_available ? "" : " set aside",
      machine.reserved_session_id && machine.reserved_session_id !== run.session_id ? " reserved for another session" : "",
      !names.get("machines", machine.id)?.name ? [" ", short(machine.id)] : "",
    ],
  });
  const pools = pickList({ kind: "pools", label: "Pools", type: "checkbox", changed, describe: (pool) => count(pool.machine_count, "machine") });
  const group = `target-${++serial}`;
  const by = (value, label, checked) => h("label", null, h("input", { type: "radio", name: group, value, checked, onchange: () => (swap(), changed()) }), h("span", null, label));
  const kinds = h("div.segments", { role: "radiogroup", "aria-label": "One machine or pools" }, by("machine", "One machine", true), by("pools", "All machines of pools", false));
  const usesPools = () => kinds.querySelector("input:checked").value === "pools";
  const swap = () => {
    machines.node.hidden = usesPools();
    pools.node.hidden = !usesPools();
    own?.clear();
  };
  const pinned = pinOf(run);
  let own = null;
  swap();
  own = field({
    legend: "Machine",
    keys: ["machine_id", "pool_ids"],
    choices: { ...TRIPLE, empty: "Any" },
    words: {
      keep: () =>
        pinned
          ? ["Stays the chosen machine: ", names.named("machines", pinned), "."]
          : run.pool_ids?.length
            ? ["Any machine in ", run.pool_ids.map((pool, index) => [index ? " and " : "", names.named("pools", pool)]), failed ? [". Attempt ", String(run.attempt), " failed on ", names.named("machines", failed), ", and it may be that one again."] : "."]
            : ["As before: a chosen machine stays chosen, else any machine.", failed ? [" Attempt ", String(run.attempt), " failed on ", names.named("machines", failed), "."] : ""],
      change: "A machine of a session that goes on decides over this.",
      empty: "Any machine may take it.",
    },
    change: [kinds, machines.node, pools.node],
    changed,
  });
  return Object.assign(own, {
    redraw() {
      machines.draw();
      pools.draw();
      own.show();
    },
    check() {
      if (own.mode !== "change") return null;
      const list = usesPools() ? pools : machines;
      return list.chosen.size ? null : own.refuse(usesPools() ? "Choose a pool." : "Choose a machine.", list.node.querySelector(".picks input"));
    },
    put(body) {
      if (own.mode === "empty") body.pool_ids = [];
      if (own.mode !== "change") return;
      if (usesPools()) {
        if (pools.chosen.size) body.pool_ids = [...pools.chosen];
      } else if (machines.chosen.size) [body.machine_id] = machines.chosen;
    },
    dirty: () => own.mode !== "keep",
  });
}

/** The machine that a caller asked for; a machine that was only assigned is not kept. */
function pinOf(run) {
  return run.machine_id && run.machine_id !== run.assigned_machine_id ? run.machine_id : null;
}

// --- session ----------------------------------------------------------------------------------------------------------

export function sessionField(run, changed) {
  const group = `session-${++serial}`;
  const id = h("input", { type: "text", "aria-label": "Id of the session", placeholder: "Id of the session", autocomplete: "off", spellcheck: "false", maxlength: 36 });
  const kinds = h(
    "div.segments",
    { role: "radiogroup", "aria-label": "Which session" },
    h("label", null, h("input", { type: "radio", name: group, value: "new", checked: true, onchange: () => (swap(), changed()) }), h("span", null, "A new one")),
    h("label", null, h("input", { type: "radio", name: group, value: "join", onchange: () => (swap(), changed()) }), h("span", null, "Join one")),
    run.session_id ? h("label", null, h("input", { type: "radio", name: group, value: "same", onchange: () => (swap(), changed()) }), h("span", null, "The same")) : null,
  );
  const alias = h("input", { type: "text", id: `${group}-alias`, placeholder: run.session_alias ?? "", autocomplete: "off", maxlength: 255 });
  const release = h("select", { id: `${group}-release` }, h("option", { value: "" }, run.release_session_after ? "as before (yes)" : "as before (no)"), h("option", { value: "true" }, "yes"), h("option", { value: "false" }, "no"));
  const kind = () => kinds.querySelector("input:checked").value;
  const swap = () => {
    id.hidden = kind() !== "join";
    own?.clear();
  };
  let own = null;
  swap();
  own = field({
    legend: "Session",
    keys: ["session_id", "start_session", "reuse_session", "session_alias", "release_session_after"],
    choices: TRIPLE,
    words: {
      keep: run.session_id ? ["Stays in ", run.session_alias ? theirs(run.session_alias) : short(run.session_id), ", on the machine that is reserved for it."] : "It is in no session.",
      change: "Runs of one session use one machine, one after the other.",
      empty: "The next attempt is in no session. A reserved machine stays reserved.",
    },
    change: [
      kinds,
      id,
      h("div.pair", null, h("label", { htmlFor: alias.id }, "Its name in the session"), alias),
      h("div.pair", null, h("label", { htmlFor: release.id }, "Release the machine afterwards"), release),
    ],
    changed,
  });
  return Object.assign(own, {
    check() {
      if (own.mode !== "change" || kind() !== "join") return null;
      return UUID.test(id.value.trim()) ? null : own.refuse("Paste the session's id, like 3c90c3cc-0d44-4b50-8888-8dd25736052a.", id);
    },
    put(body) {
      if (own.mode === "empty") body.reuse_session = false;
      if (own.mode !== "change") return;
      if (kind() === "new") body.start_session = true;
      if (kind() === "join" && UUID.test(id.value.trim())) body.session_id = id.value.trim();
      if (alias.value) body.session_alias = alias.value;
      if (release.value) body.release_session_after = release.value === "true";
    },
    refuseAt(_, message, key) {
      const control = { session_id: id, session_alias: alias, release_session_after: release }[key];
      return own.refuse(message, control?.hidden ? undefined : control);
    },
    dirty: () => own.mode !== "keep",
  });
}

// --- priority and reason ----------------------------------------------------------------------------------------------

export function priorityField(run, changed, stays) {
  const own = field({
    legend: "Priority",
    keys: ["is_priority"],
    choices: { keep: "Keep", change: "Priority", empty: "Normal" },
    words: { keep: stays ?? (run.is_priority ? "It has priority." : "Normal."), change: "Starts before runs without priority.", empty: "Waits its turn." },
    change: [],
    changed,
  });
  return Object.assign(own, {
    put(body) {
      if (own.mode !== "keep") body.is_priority = own.mode === "change";
    },
    dirty: () => own.mode !== "keep",
  });
}

const HOUR_MS = 3_600_000;
const FURTHEST_MS = 30 * 24 * HOUR_MS; // of a start from now

/** A field for the time before which a run does not start. */
export function momentInput(label, at) {
  return h("input", { type: "datetime-local", "aria-label": label, value: local(new Date(at).toISOString()), max: local(new Date(now() + FURTHEST_MS).toISOString()) });
}

/** Its time as the API has it, or null and why not. */
export function momentOf(input) {
  if (!input.value) return [null, "Choose a time."];
  const at = Date.parse(input.value);
  return at > now() + FURTHEST_MS ? [null, "A run can be held for at most 30 days."] : [new Date(at).toISOString(), ""];
}

/** When the next attempt may start. */
export function startField(changed) {
  const input = momentInput("Start not before", now() + HOUR_MS);
  const own = field({
    legend: "Start",
    keys: ["not_before"],
    choices: { keep: "At once", change: "Later" },
    words: { keep: "As soon as a machine can take it.", change: "It is held until then. It can be moved, or started at once, while it is held." },
    change: [input],
    changed,
  });
  return Object.assign(own, {
    check() {
      const why = own.mode === "change" && momentOf(input)[1];
      return why ? own.refuse(why, input) : null;
    },
    put(body) {
      if (own.mode !== "change") return;
      const [at] = momentOf(input);
      if (at) body.not_before = at;
    },
    dirty: () => own.mode !== "keep",
  });
}

export function reasonField() {
  const id = `reason-${++serial}`;
  const left = h("span.faint", { id: `${id}-left` });
  const error = h("p.error", { id: `${id}-error`, role: "alert" });
  const input = h("input", { type: "text", id, maxlength: 500, autocomplete: "off", "aria-describedby": `${id}-left ${id}-error`, placeholder: "why you retry it; others see it" });
  input.addEventListener("input", () => fill(left, input.value.length > 400 ? `${500 - input.value.length} left` : ""));
  const node = h("div.field", null, h("label.legend", { htmlFor: id }, "Reason ", h("span.faint", null, "optional")), input, left, error);
  return {
    node,
    keys: ["reason"],
    check: () => null,
    clear: () => (fill(error), input.removeAttribute("aria-invalid")),
    wipe() {},
    refuse: (message) => (fill(error, message), input.setAttribute("aria-invalid", "true"), input),
    put(body) {
      if (input.value.trim()) body.reason = input.value.trim();
    },
    dirty: () => Boolean(input.value.trim()),
  };
}
