// The list of runs. Rows stay where they are: what is new is announced, and comes when it is asked for.

import { aborted, call, may, page, poll } from "./api.js";
import { UUID, ascii, clock, copyButton, count, fill, h, icon, local, notice, now, reason, say, short, silent, skeleton, status, theirs, time, toast, took } from "./dom.js";
import { openBulkRetry } from "./bulk.js";
import { moment as startMoment } from "./later.js";
import * as names from "./names.js";
import { picker } from "./picker.js";

const PAGE = 100;
const FIELDS = "status,attempt,error,scheduling_reason,not_before,next_retry_at,last_report_at,is_reporting,session_id,started_at,ended_at,changed_at";
const LEAN = FIELDS.replace("error,", ""); // when the errors of a page are too long together
const STATUSES = ["scheduling", "running", "success", "error", "task_failed", "cancelled"];
const ENDED = ["success", "error", "task_failed", "cancelled"];
const MOST_CHOSEN = 10_000; // runs of one bulk retry
const COUNTS_MS = 10_000;
const PERIODS = { "1h": ["Last hour", 3600], "24h": ["Last 24 hours", 86_400], "7d": ["Last 7 days", 604_800] };

let left = null; // where the list was when it was left: {address, top, id}
let inList = []; // the ids of the list that was shown last, in its order

/** The runs before and after one in the list that it was opened from. */
export function neighbours(id) {
  const at = inList.indexOf(id);
  return at < 0 ? [null, null] : [inList[at - 1] ?? null, inList[at + 1] ?? null];
}

export function runsView(root, first) {
  let filter = read(first.params);
  const rows = new Map(); // id -> {tr, link, shown}
  const chosen = new Set(); // ids, also of pages that are not shown
  let allMatching = false; // instead: whatever matches the filter
  let lastPicked = null; // where a range begins
  let latest = { items: [], total: 0 };
  let adopted = false; // whether the rows are those of this filter
  let countsAt = 0;
  let [namesakesOf, namesakes] = ["", []]; // a searched text, and the workflows whose name has it

  // --- filters --------------------------------------------------------------------------------------------------------

  const chips = new Map(
    [null, ...STATUSES].map((name) => {
      const number = h("b");
      const link = h("a.chip", null, name ? status(name) : h("span", null, "All"), number);
      return [name, { link, number }];
    }),
  );
  const workflow = finder("workflows", "Workflow", "workflow", "Any workflow");
  const machine = finder("machines", "Machine", "machine", "Any machine");
  const session = h("input", { type: "search", placeholder: "Any session", "aria-label": "Session id", autocomplete: "off", spellcheck: "false" });
  session.addEventListener("change", () => {
    const given = session.value.trim();
    if (given && !UUID.test(given)) {
      session.setAttribute("aria-invalid", "true");
      refuse(`A session is named by its whole id, and “${given}” is none. Search finds a session by its name.`);
      return;
    }
    session.removeAttribute("aria-invalid");
    go({ session: given });
  });
  const search = h("input", { type: "search", placeholder: "Search", "aria-label": "Search in ids, values, results, errors and the names of sessions and workflows", autocomplete: "off", spellcheck: "false", maxlength: 200 });
  search.addEventListener("change", () => go({ search: search.value.trim() }));
  const order = h("select", { "aria-label": "Order", onchange: () => go({ order: order.value }) }, h("option", { value: "" }, "Newest first"), h("option", { value: "changed" }, "Last changed first"));
  const period = h(
    "select",
    {
      "aria-label": "Created",
      onchange: () => {
        if (period.value === "custom") {
          custom.hidden = false;
          from.focus();
        } else go({ since: period.value, from: "", to: "" });
      },
    },
    h("option", { value: "" }, "Any time"),
    Object.entries(PERIODS).map(([value, [label]]) => h("option", { value }, label)),
    h("option", { value: "custom" }, "From … to …"),
  );
  const from = moment("Created from", "from");
  const to = moment("Created to", "to");
  const custom = h("span.custom", { hidden: true }, from, h("span", null, "to"), to);
  const clear = h("button.quiet", { type: "button", onclick: () => go({ status: "", workflow: "", machine: "", session: "", search: "", since: "", from: "", to: "" }) }, icon("close"), "Clear");

  function finder(kind, label, param, any) {
    return picker({
      kind,
      label,
      any,
      picked: (id) => go({ [param]: id }),
      unpicked: (text) => refuse(`No ${param} was chosen for “${text}”: choose one of the names that it finds.`),
    });
  }

  function moment(label, param) {
    const node = h("input", {
      type: "datetime-local",
      "aria-label": label,
      onchange: () => go({ since: "", [param]: node.value ? new Date(node.value).toISOString() : "" }),
    });
    return node;
  }

  // --- choosing -------------------------------------------------------------------------------------------------------

  const mayChoose = may("runs:write");
  const pickAll = h("input", { type: "checkbox", "aria-label": "Choose all runs of this page", onchange: () => pickPage(pickAll.checked) });
  const choice = h("div.line.choice", { role: "group", "aria-label": "Chosen runs", hidden: true });

  function pick(row, on, range) {
    const all = [...rows.values()];
    const [begin, end] = range && lastPicked && rows.has(lastPicked) ? [all.findIndex((one) => one.run.id === lastPicked), all.indexOf(row)].sort((one, other) => one - other) : [all.indexOf(row), all.indexOf(row)];
    for (const one of all.slice(begin, end + 1)) {
      if (on) chosen.add(one.run.id);
      else chosen.delete(one.run.id);
    }
    allMatching = false;
    lastPicked = row.run.id;
    drawChoice();
  }

  function pickPage(on) {
    for (const id of rows.keys()) {
      if (on) chosen.add(id);
      else chosen.delete(id);
    }
    allMatching = false;
    drawChoice();
  }

  function leaveAll() {
    chosen.clear();
    allMatching = false;
    lastPicked = null;
    drawChoice();
  }

  /** Those of the filter that were there when they were counted: what comes later is not swept along. */
  function matching() {
    const { skip: _skip, order: _order, after: _after, search: _search, ...asked } = query({ ...filter, before: "", after: "" });
    return { ...Object.fromEntries(Object.entries(asked).filter(([, value]) => value)), status: [filter.status], created_at_to: asked.created_at_to || new Date(now()).toISOString() };
  }

  function drawChoice() {
    if (!mayChoose) return;
    for (const row of rows.values()) {
      row.box.checked = allMatching || chosen.has(row.run.id);
      row.tr.classList.toggle("chosen", row.box.checked);
    }
    const here = [...rows.keys()].filter((id) => chosen.has(id)).length;
    pickAll.checked = rows.size > 0 && (allMatching || here === rows.size);
    pickAll.indeterminate = !allMatching && here > 0 && here < rows.size;
    const number = allMatching ? latest.total : chosen.size;
    const offersAll = !allMatching && here === rows.size && latest.total > chosen.size && ENDED.includes(filter.status) && !filter.search;
    const shown = JSON.stringify([number, offersAll && latest.total]);
    if (choice.dataset.shown === shown) return;
    choice.dataset.shown = shown;
    choice.hidden = number === 0;
    fill(
      choice,
      h("b", null, `${count(number, "run")} chosen`),
      h("button.primary", { type: "button", "aria-keyshortcuts": "Shift+R", onclick: retryChosen }, icon("retry"), "Retry chosen …"),
      offersAll ? h("button", { type: "button", onclick: () => ((allMatching = true), drawChoice()) }, `Choose all ${latest.total.toLocaleString()} that match`) : null,
      h("button.quiet", { type: "button", onclick: leaveAll }, icon("close"), "Leave all out"),
    );
    say(number ? `${count(number, "run")} chosen` : "");
  }

  function retryChosen() {
    const number = allMatching ? latest.total : chosen.size;
    if (!number) say("Choose runs first, with x.");
    else if (number > MOST_CHOSEN) toast(`A bulk retry can have ${MOST_CHOSEN.toLocaleString()} runs, and these are ${number.toLocaleString()}. Narrow the filters.`, "bad");
    else openBulkRetry({ chosen: allMatching ? { filter: matching() } : { run_ids: [...chosen] }, total: number });
  }

  // --- the page -------------------------------------------------------------------------------------------------------

  const refused = h("div.unapplied", { role: "status" }); // filters that cannot be applied
  const namesakeLine = h("p.namesakes");
  const summary = h("p.summary");
  const news = h("button.news", { type: "button", hidden: true, onclick: adoptNews });
  const body = h("tbody");
  const table = h(
    "table.runs",
    { "aria-label": "Runs, newest first" },
    h(
      "thead",
      null,
      h("tr", null, ["Status", "Id", "Workflow", "Attempt", "Machine", "Why, or what went wrong", "Created", "Changed"].map((title) => h("th", { scope: "col" }, title))),
    ),
    body,
  );
  const below = h("div.below");
  fill(
    root,
    h("h1.unseen", { tabindex: -1 }, "Runs"),
    h("nav.chips", { "aria-label": "Status" }, [...chips.values()].map((chip) => chip.link)),
    h("div.filters", { role: "group", "aria-label": "Filters" }, workflow.node, machine.node, session, search, period, custom, order, clear),
    refused,
    namesakeLine,
    h("div.line", null, mayChoose ? h("label.check.pickall", null, pickAll, "Choose all") : null, summary, news),
    choice,
    h("div.scroll", null, table),
    below,
  );
  drawFilters();
  waiting();
  refuse(...unreadable(first.params));

  // The page of a run begins at its top, and has done so by the time this list is left.
  let place = 0;
  let opened = null;
  const remember = () => adopted && (place = scrollY);
  addEventListener("scroll", remember, { passive: true });

  /** A filter that is not applied. What the list shows is as if it had not been given. */
  function refuse(...sentences) {
    fill(refused, sentences.length ? [icon("warn"), h("span", null, h("b", null, "Not applied: "), sentences.join(" "))] : null);
    if (sentences.length) say(sentences.join(" "));
  }

  /** Workflows whose name has the text that is searched for. */
  function drawNamesakes() {
    fill(namesakeLine, namesakes.length ? ["Workflows with this name: ", namesakes.slice(0, 5).map((item) => [h("a.chip", { href: address({ ...filter, before: "", after: "", search: "", workflow: item.id }) }, theirs(names.nameOf("workflows", item.id))), " "])] : null);
  }

  /** Other filters: a new address, from which everything else follows. */
  function go(changes) {
    location.hash = address({ ...filter, before: "", after: "", ...changes });
  }

  function waiting() {
    adopted = false;
    rows.clear();
    latest = { items: [], total: 0 };
    news.hidden = true;
    table.hidden = true;
    fill(summary, "Loading …");
    fill(below, skeleton(8));
  }

  function drawFilters() {
    for (const [name, { link }] of chips) {
      link.href = address({ ...filter, before: "", after: "", status: name ?? "" });
      if ((name ?? "") === filter.status) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    workflow.set(filter.workflow);
    machine.set(filter.machine);
    if (!session.getAttribute("aria-invalid")) session.value = filter.session;
    if (document.activeElement !== search) search.value = filter.search;
    order.value = filter.order;
    const bounded = Boolean(filter.from || filter.to);
    period.value = bounded ? "custom" : filter.since;
    custom.hidden = !bounded;
    from.value = local(filter.from);
    to.value = local(filter.to);
    clear.hidden = !isFiltered();
  }

  function isFiltered() {
    return ["status", "workflow", "machine", "session", "search", "since", "from", "to"].some((name) => filter[name]);
  }

  // --- rounds ---------------------------------------------------------------------------------------------------------

  async function round(signal) {
    const asked = filter;
    const behind = adopted && !byCursor() ? fresh().length : 0;
    const { data } = await page("runs", { query: { ...query(asked), fields: FIELDS, limit: Math.min(1000, PAGE + behind) }, lean: LEAN, signal });
    if (asked !== filter) return;
    if (asked.search && namesakesOf !== asked.search) await loadNamesakes(asked, signal);
    if (asked !== filter) return;
    if (!data.items.length && !data.total && !data.next && asked.search && !asked.workflow && namesakes.length === 1) {
      toast(`No run holds “${asked.search}”. These are the runs of the workflow with this name.`);
      go({ search: "", workflow: namesakes[0].id });
      return;
    }
    latest = data;
    draw();
    poll.heard();
    // Names and counts come after the first paint.
    await Promise.all([names.load("workflows", signal), names.load("machines", signal)]);
    const items = latest.items.slice(0, PAGE);
    await Promise.all([
      names.loadMissing("workflows", [...items.map((run) => run.workflow_id), asked.workflow], signal),
      names.loadMissing("machines", [...items.map((run) => run.machine_id), asked.machine], signal),
    ]);
    if (asked !== filter) return;
    draw();
    drawFilters();
    if (now() - countsAt > COUNTS_MS) await loadCounts(asked, signal);
  }

  async function loadNamesakes(asked, signal) {
    const { items } = asked.workflow ? { items: [] } : await names.find("workflows", asked.search, signal);
    if (asked !== filter) return;
    namesakes = items.filter((item) => names.nameOf("workflows", item.id).toLowerCase().includes(asked.search.toLowerCase()));
    namesakesOf = asked.search;
    drawNamesakes();
  }

  async function loadCounts(asked, signal) {
    const counted = await Promise.all(
      [null, ...STATUSES].map(async (name) => {
        const { data } = await call("GET", "runs", { query: { ...query({ ...asked, before: "", after: "" }), status: name, fields: "id", limit: 1 }, signal });
        return [name, data.total];
      }),
    );
    if (asked !== filter) return;
    countsAt = now();
    for (const [name, total] of counted) setCount(name, total);
  }

  function setCount(name, total) {
    const text = total.toLocaleString();
    const { number } = chips.get(name);
    if (number.textContent !== text) number.textContent = text;
  }

  /** Whether pages follow each other by the service's cursors: other lists go by the time of creation. */
  function byCursor() {
    return Boolean(filter.order || filter.search);
  }

  function at(run) {
    return filter.order ? run.changed_at : run.created_at;
  }

  /** Runs that came into the list since it was painted. */
  function fresh() {
    if (filter.after) return [];
    if (rows.size < PAGE) return latest.items.filter((run) => !rows.has(run.id));
    const oldest = at([...rows.values()].at(-1).run);
    return latest.items.filter((run) => !rows.has(run.id) && at(run) > oldest);
  }

  function draw() {
    if (!adopted || (rows.size === 0 && latest.items.length > 0)) adopt();
    const known = new Map(latest.items.map((run) => [run.id, run]));
    const last = latest.items.at(-1);
    for (const [id, row] of rows) {
      const run = known.get(id);
      if (run) update(row, run);
      else if (!last || latest.items.length < PAGE || at(row.run) > at(last)) leave(row);
    }
    if (!rows.size && !latest.next) drawEmpty();
    drawNews();
    drawChoice();
    if (!filter.before) setCount(filter.status || null, latest.total);
    const shown = rows.size;
    fill(summary, latest.total > shown ? `${shown.toLocaleString()} of ${count(latest.total, "run")}` : count(shown, "run"), filter.before ? ` from ${clock(filter.before.split("~")[0])} back` : filter.order ? ", last changed first" : ", newest first", latest.list_is_partial || latest.search_is_partial ? ". Only the newest 10,000 were looked at" : "");
  }

  function drawNews() {
    const many = fresh().length;
    const text = many ? `${many >= 900 ? "Over 900" : many} new` : "";
    if (news.dataset.text === text) return;
    news.dataset.text = text;
    news.hidden = !many;
    fill(news, many && [icon("up"), text, h("span.unseen", null, many === 1 ? " run: show it" : " runs: show them")]);
    if (many) say(`${text} ${many === 1 ? "run" : "runs"}`);
  }

  function adoptNews() {
    const before = new Set(rows.keys());
    adopt();
    draw();
    scrollTo({ top: 0 });
    const [newest] = [...rows.values()];
    newest?.link.focus({ preventScroll: true });
    for (const [id, row] of rows) if (!before.has(id)) row.tr.classList.add("flash");
  }

  function adopt() {
    adopted = true;
    const items = latest.items.slice(0, PAGE);
    rows.clear();
    for (const run of items) rows.set(run.id, newRow(run));
    fill(body, [...rows.values()].map((row) => row.tr));
    table.hidden = items.length === 0;
    if (items.length || latest.next) fill(below, pager(items));
    drawChoice();
    inList = items.map((run) => run.id);
    if (left?.address === address(filter)) comeBack(left);
    left = null;
  }

  function comeBack({ top, id }) {
    rows.get(id)?.link.focus({ preventScroll: true });
    scrollTo(0, top);
  }

  // --- rows -----------------------------------------------------------------------------------------------------------

  function newRow(run) {
    const link = h("a", { href: `#/runs/${run.id}`, onclick: () => (opened = run.id) }, short(run.id));
    const cells = Object.fromEntries(["status", "id", "workflow", "attempt", "machine", "why", "age", "changed"].map((name) => [name, h(`td.c-${name}`)]));
    cells.id.append(link);
    cells.age.append(time(run.created_at, "age"));
    const cellsOf = Object.values(cells);
    const word = h("span");
    const box = h("input.pick", { type: "checkbox", "aria-label": `Choose run ${run.id.slice(0, 8)}`, onclick: (event) => pick(row, box.checked, event.shiftKey) });
    fill(cells.status, mayChoose ? box : null, word);
    cells.status = word;
    const tr = h(
      "tr",
      {
        onclick: (event) => {
          // A click anywhere on the row opens it, unless it ends the selection of some text.
          if (event.target.closest("a, input") || event.ctrlKey || event.metaKey || String(getSelection())) return;
          opened = run.id;
          location.hash = link.hash;
        },
      },
      cellsOf,
    );
    const row = { tr, link, cells, box, run, shown: "" };
    update(row, run);
    return row;
  }

  /** In place: what has the focus, or is selected, stays. */
  function update(row, run) {
    const { cells } = row;
    set(cells.workflow, names.nameOf("workflows", run.workflow_id), () => names.named("workflows", run.workflow_id));
    set(cells.machine, run.machine_id && names.nameOf("machines", run.machine_id), () => (run.machine_id ? names.named("machines", run.machine_id) : h("span.faint", null, "–")));
    const shown = JSON.stringify(run);
    if (!row.tr.classList.contains("gone")) set(cells.why, `${shown}${Boolean(silent(run))}`, () => why(run)); // silence comes by itself
    if (shown === row.shown) return;
    const moved = row.shown && (row.run.status !== run.status || row.run.attempt !== run.attempt);
    Object.assign(row, { run, shown });
    row.link.setAttribute("aria-label", `Run ${run.id.slice(0, 8)}, ${run.status}`);
    set(cells.status, run.status, () => status(run.status));
    set(cells.attempt, run.attempt, () => String(run.attempt));
    
    set(cells.changed, run.changed_at, () => time(run.changed_at, "age"));
    row.tr.classList.remove("gone");
    row.tr.classList.toggle("flash", Boolean(moved));
  }

  function set(cell, key, content) {
    if (cell.key === key) return;
    cell.key = key;
    fill(cell, content());
  }

  function leave(row) {
    if (row.tr.classList.contains("gone")) return;
    row.tr.classList.add("gone");
    row.shown = "";
    row.cells.why.key = "";
    fill(row.cells.why, filter.status ? `No longer ${filter.status}` : "No longer in this list");
  }

  function pager(items) {
    if (byCursor()) {
      return h(
        "nav.pager",
        { "aria-label": "Pages" },
        filter.after ? h("a.button", { href: address({ ...filter, after: "" }) }, icon("back"), "First page") : null,
        latest.next ? h("a.button", { href: address({ ...filter, after: latest.next }) }, "Older", icon("next")) : h("span.faint", null, "That is all."),
      );
    }
    const oldest = items.at(-1).created_at;
    const twins = items.filter((run) => run.created_at === oldest).length;
    const [anchor, skipped] = filter.before.split("~");
    const skip = anchor === oldest ? Number(skipped) + items.length : twins;
    return h(
      "nav.pager",
      { "aria-label": "Pages" },
      filter.before ? h("a.button", { href: address({ ...filter, before: "", after: "" }) }, icon("back"), "Newest") : null,
      items.length === PAGE ? h("a.button", { href: address({ ...filter, before: `${oldest}~${skip}` }) }, "Older", icon("next")) : h("span.faint", null, "That is all."),
    );
  }

  function drawEmpty() {
    const of = JSON.stringify([filter, names.all("workflows")[0]?.id]);
    if (below.firstChild?.of === of) return;
    fill(below, empty());
    below.firstChild.of = of;
  }

  function empty() {
    if (filter.before) return notice("info", "No older runs", h("p", null, h("a", { href: address({ ...filter, before: "", after: "" }) }, "Back to the newest")));
    if (isFiltered()) return notice("info", "No run matches these filters", h("button", { type: "button", onclick: () => clear.click() }, "Show all runs"));
    const text = () => createCurl(names.all("workflows")[0]);
    return notice(
      "info",
      "No runs yet",
      may("runs:write") ? h("p", null, "A run executes a workflow on a machine. This makes one; it appears here at once:") : h("p", null, "This key may not create runs (it lacks the scope runs:write)."),
      may("runs:write") ? h("div.snippet", null, h("pre.code", { tabindex: 0, role: "group", "aria-label": "curl" }, text()), copyButton(text, "curl")) : null,
    );
  }

  // --- keys -----------------------------------------------------------------------------------------------------------

  function step(by) {
    const all = [...rows.values()];
    const at = all.findIndex((row) => row.tr.contains(document.activeElement));
    const next = at < 0 ? 0 : Math.max(0, Math.min(all.length - 1, at + by));
    all[next]?.link.focus();
  }

  function retryFocused() {
    const row = [...rows.values()].find(({ tr }) => tr.contains(document.activeElement)) ?? [...rows.values()].find(({ tr }) => tr.matches(":hover"));
    if (row) location.hash = `#/runs/${row.run.id}/now?retry`;
    else say("Choose a run first, with j and k.");
  }

  function pickFocused() {
    const row = [...rows.values()].find(({ tr }) => tr.contains(document.activeElement));
    if (row && mayChoose) pick(row, !row.box.checked, false);
  }

  return {
    title: () => (filter.status ? `Runs: ${filter.status}` : "Runs"),
    change({ params }) {
      const next = read(params);
      session.removeAttribute("aria-invalid");
      refuse(...unreadable(params));
      if (JSON.stringify(next) === JSON.stringify(filter)) return;
      if (JSON.stringify({ ...next, before: "", after: "" }) !== JSON.stringify({ ...filter, before: "", after: "" })) leaveAll();
      filter = next;
      [namesakesOf, namesakes] = ["", []];
      drawNamesakes();
      countsAt = 0;
      drawFilters();
      waiting();
      poll.now(true).catch((error) => aborted(error) || console.error(error));
    },
    round,
    destroy() {
      const row = [...rows.values()].find(({ tr }) => tr.contains(document.activeElement));
      left = { address: address(filter), top: place, id: row?.run.id ?? opened };
      removeEventListener("scroll", remember);
    },
    keys: { j: () => step(1), k: () => step(-1), r: retryFocused, x: pickFocused, R: retryChosen },
  };
}

// --- the address ------------------------------------------------------------------------------------------------------

function read(params) {
  const get = (name) => params.get(name) ?? "";
  const id = (name) => (UUID.test(get(name)) ? get(name) : "");
  const at = (name) => (Number.isNaN(Date.parse(get(name))) ? "" : new Date(get(name)).toISOString());
  return {
    status: STATUSES.includes(get("status")) ? get("status") : "",
    workflow: id("workflow"),
    machine: id("machine"),
    session: id("session"),
    since: Object.hasOwn(PERIODS, get("since")) ? get("since") : "",
    from: at("from"),
    to: at("to"),
    search: get("search").trim().slice(0, 200),
    order: get("order") === "changed" ? "changed" : "",
    before: /^[0-9T:.Z+-]{10,40}~\d{1,9}$/.test(get("before")) ? get("before") : "",
    after: /^[A-Za-z0-9_-]{1,200}$/.test(get("after")) ? get("after") : "",
  };
}

/** A sentence for each filter of an address that read() leaves out. */
function unreadable(params) {
  const known = read(params);
  const words = {
    status: (text) => `there is no status “${text}”.`,
    workflow: (text) => `“${text}” is no id of a workflow.`,
    machine: (text) => `“${text}” is no id of a machine.`,
    session: (text) => `“${text}” is no id of a session; search finds a session by its name.`,
    since: (text) => `“${text}” is no period that the console has.`,
    from: (text) => `“${text}” is no time.`,
    to: (text) => `“${text}” is no time.`,
    order: (text) => `there is no order “${text}”.`,
    before: () => "the page cannot be read from this address; this is the first one.",
    after: () => "the page cannot be read from this address; this is the first one.",
  };
  const wrong = [...new Set(params.keys())].filter((name) => params.get(name) && name !== "search" && !(Object.hasOwn(known, name) && known[name]));
  return wrong.map((name) => (Object.hasOwn(words, name) ? words[name](params.get(name)) : `there is no filter “${name}”.`));
}

function address(filter) {
  const params = new URLSearchParams(Object.entries(filter).filter(([, value]) => value));
  return `#/runs${params.size ? `?${params}` : ""}`;
}

/** What the API is asked for. */
function query({ status: wanted, workflow, machine, session, search, order, since, from, to, before, after }) {
  const [anchor, skip] = before ? before.split("~") : [];
  return {
    status: wanted,
    workflow_id: workflow,
    machine_id: machine,
    session_id: session,
    created_at_from: since ? new Date(now() - PERIODS[since][1] * 1000).toISOString() : from,
    created_at_to: anchor ?? to,
    search,
    order,
    after,
    skip,
  };
}

/** Why it waits, or the first line of what went wrong, or how long it took. */
function why(run) {
  if (run.not_before) return ["Starts at ", startMoment(run.not_before)];
  if (run.status === "scheduling") return run.scheduling_reason ? reason(run.scheduling_reason) : null;
  const quiet = silent(run);
  if (quiet) return h(`span.${quiet.isAmber ? "wait" : "faint"}`, null, icon("warn"), " no report for ", quiet.time);
  if (run.status === "running") return run.started_at ? ["for ", time(run.started_at, "since")] : null;
  const retried = run.next_retry_at ? ["Retried at ", startMoment(run.next_retry_at), run.error?.length ? ": " : ""] : null;
  if (run.error?.length) {
    const [line] = String(run.error[0]).split("\n", 1);
    return [retried, theirs(line.length > 300 ? `${line.slice(0, 300)}…` : line)];
  }
  if (retried) return retried;
  if (["error", "task_failed"].includes(run.status) && run.error === undefined) return h("span.faint", null, "Too long for this list: open the run");
  if (run.started_at && run.ended_at) return h("span.faint", null, `took ${took(Date.parse(run.ended_at) - Date.parse(run.started_at))}`);
  return null;
}

function createCurl(workflow) {
  const root = new URL("../v1", location.href.split("#")[0]);
  const post = (path, body) => `curl -sS -X POST ${root}/${path} \\\n  -H "Authorization: Bearer $API_KEY" -H 'Content-Type: application/json' \\\n  -d '${ascii(JSON.stringify(body))}'`;
  if (workflow) return post("runs", { workflow_id: workflow.id });
  return `${post("workflows", { name: "Hello", main_prompt: "Open the editor and write hello." })}\n# then, with the id it answers:\n${post("runs", { workflow_id: "ID" })}`;
}
