// The shell: which screen the address names, who is signed in, how fresh it is, and what the keys do.

import { IDLE_MS, Problem, Unreachable, checkIdle, may, me, poll, signIn, signOut, storedKey, watchKey, aborted, call } from "./api.js";
import { UUID, clock, fill, h, hush, icon, installVoice, notice, openDialog, park, say, showAgain, span, theirs, tick, timestamp, toast, zone } from "./dom.js";
import { bulkView } from "./bulk.js";
import { keysView } from "./keys.js";
import { machinesView } from "./machines.js";
import { forget } from "./names.js";
import { queueView } from "./queue.js";
import { runView } from "./run.js";
import { runsView } from "./runs.js";
import { signInView } from "./signin.js";
import { webhooksView } from "./webhooks.js";
import { workflowsView } from "./workflows.js";

let inside = false; // whether somebody is signed in and the shell is on the page
let view = null; // {name, title(), change(route), round(signal), keys, destroy()}
let lastList = "#/runs";
let parked = null; // {organization, dialogs} of a key that was refused

// --- addresses --------------------------------------------------------------------------------------------------------

/** #/runs?status=error, #/runs/<id>/<tab>, #/bulk, #/bulk/<id>, #/queue, #/machines, #/workflows, #/workflows/<id>, #/webhooks, #/webhooks/<id>, #/keys. What is not understood is the list of runs. */
function route() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const [name, id, tab] = path.split("/");
  const params = new URLSearchParams(query);
  if (["queue", "machines", "keys"].includes(name)) return { name, params };
  if (["bulk", "webhooks", "workflows"].includes(name)) return { name, id: id && UUID.test(id) ? id.toLowerCase() : undefined, params };
  if (name === "runs" && id && UUID.test(id)) return { name: "run", id: id.toLowerCase(), tab: tab || "now", params };
  return { name: "runs", params };
}

const VIEWS = { runs: runsView, run: runView, bulk: bulkView, queue: queueView, webhooks: webhooksView, keys: keysView, machines: machinesView, workflows: workflowsView };

const FOR_PEOPLE = ["queue", "webhooks", "bulk", "machines", "workflows", "keys"]; // not for a key that belongs to a machine

function show() {
  if (!inside) return;
  if (!may("runs:read")) {
    fill(main, notice("warn", "This key may not read runs", h("p", null, "The console does nothing without that. It needs a key with the scope runs:read.")));
    titleIs("No access");
    return;
  }
  const to = route();
  if (to.name === "runs") lastList = location.hash || "#/runs";
  markNavigation(to.name);
  if ((FOR_PEOPLE.includes(to.name) && me.machine_id) || (to.name === "keys" && !may("keys:read"))) {
    location.replace("#/runs");
    return;
  }
  if (view?.name === to.name && view.id === to.id) {
    view.change(to);
    titleIs(view.title());
    return;
  }
  view?.destroy?.();
  const root = h("div.view");
  fill(main, root);
  view = VIEWS[to.name](root, to, { lastList: () => lastList, titled: () => view && titleIs(view.title()) });
  Object.assign(view, { name: to.name, id: to.id });
  titleIs(view.title());
  scrollTo(0, 0);
  root.querySelector("h1")?.focus({ preventScroll: true });
  say(view.title());
  poll.set((signal) => view.round(signal));
}

function titleIs(title) {
  document.title = `${title} · Runs console`;
}

// --- the bar ----------------------------------------------------------------------------------------------------------

const navigation = {
  runs: h("a", { href: "#/runs" }, "Runs"),
  bulk: h("a", { href: "#/bulk" }, "Bulk retries"),
  queue: h("a", { href: "#/queue" }, "Queue"),
  machines: h("a", { href: "#/machines" }, "Machines"),
  workflows: h("a", { href: "#/workflows" }, "Workflows"),
  webhooks: h("a", { href: "#/webhooks" }, "Webhooks"),
  keys: h("a", { href: "#/keys" }, "Keys"),
};
const jump = h("input", {
  type: "search",
  id: "jump",
  placeholder: "Paste an id",
  autocomplete: "off",
  spellcheck: "false",
  "aria-label": "Go to the run, workflow, machine or session with this id",
  "aria-keyshortcuts": "/",
});
const fresh = h("span.fresh");
const pauseButton = h("button.quiet", { type: "button", "aria-keyshortcuts": "p", onclick: () => togglePause() });
const who = h("button.quiet.who", { type: "button", "aria-haspopup": "dialog", onclick: () => showKey() });
const bar = h(
  "header.top",
  null,
  h("button.skip", { type: "button", onclick: () => main.focus() }, "Skip to the content"),
  h("span.brand", null, h("img", { src: "icon.svg", alt: "", width: 20, height: 20 }), h("span", null, "Runs")),
  h("nav", { "aria-label": "Screens" }, Object.values(navigation)),
  h("form.jump", { role: "search", onsubmit: (event) => (event.preventDefault(), jumpTo(jump.value)) }, icon("search"), jump, h("kbd", { "aria-hidden": "true" }, "/")),
  h("div.pulse", null, fresh, pauseButton),
  who,
);
const banner = h("div.banner", { role: "status" });
const foot = h("footer.foot");
const main = h("main", { id: "main", tabindex: -1 });

function markNavigation(name) {
  for (const [key, link] of Object.entries(navigation)) {
    if (key === name || (key === "runs" && name === "run")) link.setAttribute("aria-current", key === name ? "page" : "true");
    else link.removeAttribute("aria-current");
  }
  bar.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  navigation.runs.href = name === "runs" ? "#/runs" : lastList;
}

function togglePause() {
  poll.pause(!poll.paused);
  say(poll.paused ? "Paused: nothing is updated." : "Updating again.");
}

let drawn = "";

/** How fresh the screen is; a failure takes a line of its own, and what was known stays below it. */
function drawPulse() {
  tick();
  const age = poll.last ? Math.round((Date.now() - poll.last) / 1000) : null;
  const fault = poll.problem && !view?.handles?.(poll.problem) ? poll.problem : null;
  const text = poll.paused
    ? `paused${age === null ? "" : `, ${span(age * 1000)} old`}`
    : age === null
      ? "loading …"
      : age < 1
        ? "updated now"
        : `updated ${span(age * 1000)} ago`;
  if (fresh.textContent !== text) fresh.textContent = text;
  const kind = fault ? "bad" : poll.paused ? "paused" : "live";
  if (fresh.dataset.kind !== kind) fresh.dataset.kind = kind;
  const label = poll.paused ? "Go on updating" : "Pause updating";
  if (pauseButton.title !== label) {
    pauseButton.title = label;
    pauseButton.setAttribute("aria-label", label);
    fill(pauseButton, icon(poll.paused ? "play" : "pause"));
  }
  drawBanner(fault);
}

function drawBanner(fault) {
  const key = fault ? `${fault.message}${poll.busy}` : "";
  if (key !== drawn) {
    drawn = key;
    fill(
      banner,
      fault && [
        icon("warn"),
        h("span", null, fault instanceof Problem || fault instanceof Unreachable ? fault.message : "The page itself failed at this.", poll.last ? ` What you see is of ${clock(poll.last)}.` : ""),
        h("span.countdown"),
        h("button", { type: "button", onclick: () => poll.now(true) }, "Try now"),
      ],
    );
  }
  const countdown = banner.querySelector(".countdown");
  if (countdown) countdown.textContent = poll.busy ? "Trying …" : poll.paused ? "" : `Again in ${span(Math.max(0, poll.next - Date.now()) + 999)}.`;
}

// --- jumping to an id -------------------------------------------------------------------------------------------------

async function jumpTo(given) {
  const id = given.trim().toLowerCase();
  if (!UUID.test(id)) {
    toast(id ? "That is no id. Ids look like 3c90c3cc-0d44-4b50-8888-8dd25736052a." : "Paste the id of a run, workflow, machine or session.", "bad");
    return;
  }
  const found = await whatIs(id);
  if (found === null) toast("Nothing with this id exists in your organization.", "bad");
  if (!found) return;
  jump.value = "";
  location.hash = found;
}

/** The address that shows it; null if there is none, undefined if it could not be found out. */
async function whatIs(id) {
  try {
    for (const [path, address] of [
      [`runs/${id}`, `#/runs/${id}`],
      [`workflows/${id}`, `#/runs?workflow=${id}`],
      [`machines/${id}`, `#/runs?machine=${id}`],
      ...(me.machine_id
        ? []
        : [
            [`bulk-retries/${id}`, `#/bulk/${id}`],
            [`webhook-endpoints/${id}`, `#/webhooks/${id}`],
            [`webhook-deliveries/${id}`, null], // what a receiver has as webhook-id
          ]),
    ]) {
      try {
        const { data } = await call("GET", path);
        return address ?? (data.run_id ? `#/runs/${data.run_id}/webhooks` : `#/webhooks/${data.endpoint_id}`);
      } catch (error) {
        if (error.status !== 404) throw error;
      }
    }
    const { data } = await call("GET", "runs", { query: { session_id: id, limit: 1, fields: "id" } });
    return data.total ? `#/runs?session=${id}` : null;
  } catch (error) {
    if (!aborted(error)) toast(error.message, "bad");
    return undefined;
  }
}

// --- who is signed in -------------------------------------------------------------------------------------------------

const SCOPES = [
  ["runs:read", "see runs, workflows, machines and the queue"],
  ["runs:write", "create, retry, cancel and delete runs"],
  ["runs:execute", "report as an executor"],
  ["resources:write", "change workflows, machines and pools"],
  ["webhooks:write", "manage webhooks"],
  ["keys:read", "see the API keys' names, scopes and last use"],
];

function showKey() {
  const row = (term, value) => [h("dt", null, term), h("dd", null, value || h("span.faint", null, "–"))];
  openDialog({
    title: "Your key",
    body: [
      h(
        "dl.facts",
        null,
        row("Name", me.name && theirs(me.name)),
        row("Organization", me.organization_id && theirs(me.organization_id)),
        row("Key", me.key_id && h("span.id", null, me.key_id)),
        row("User", me.user_id && h("span.id", null, me.user_id)),
        me.machine_id ? row("Bound to machine", h("span.id", null, me.machine_id)) : null,
        row("Expires", me.expires_at ? timestamp(me.expires_at) : me.known ? "never" : null),
      ),
      me.known
        ? h(
            "ul.scopes",
            null,
            SCOPES.map(([scope, does]) =>
              h(`li${may(scope) ? "" : ".no"}`, null, icon(may(scope) ? "success" : "close"), h("span", null, may(scope) ? "May " : "May not ", does, " ", h("code", null, scope))),
            ),
          )
        : notice("info", "What it may do is not known", h("p", null, "This service does not answer /v1/whoami. A refusal will say what is missing.")),
    ],
    foot: [h("button", { type: "button", onclick: (event) => (event.target.closest("dialog").close(), signOut("left")) }, "Sign out")],
  });
}

// --- keys -------------------------------------------------------------------------------------------------------------

const KEYS = [
  ["/", "go to an id (pasting one anywhere does it too)"],
  ["j", "next row"],
  ["k", "previous row"],
  ["Enter", "open the row"],
  ["r", "retry this run"],
  ["x", "choose the row, or leave it out"],
  ["R", "retry all chosen runs"],
  ["p", "pause or go on updating"],
  ["?", "this help"],
  ["Esc", "close a dialog"],
];

function shortcutsAreOn() {
  return sessionStorage.getItem("shortcuts") !== "off";
}

function showHelp() {
  const box = h("input", {
    type: "checkbox",
    checked: shortcutsAreOn(),
    onchange: () => (box.checked ? sessionStorage.removeItem("shortcuts") : sessionStorage.setItem("shortcuts", "off")),
  });
  openDialog({
    title: "Keyboard",
    body: [
      h("dl.keys", null, KEYS.map(([key, does]) => [h("dt", null, h("kbd", null, key)), h("dd", null, does)])),
      h("label.check", null, box, "Single keys are shortcuts"),
    ],
  });
}

function typing(target) {
  return target.closest?.("input:not([type=radio], [type=checkbox]), textarea, select, [contenteditable]");
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || !inside) return;
  if (document.querySelector("dialog[open]")) return;
  if (typing(event.target)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (!shortcutsAreOn() && event.key !== "?") return;
  const act = { "/": () => jump.focus(), p: togglePause, "?": showHelp }[event.key] ?? view?.keys?.[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

addEventListener("paste", (event) => {
  const text = event.clipboardData?.getData("text/plain").trim() ?? "";
  if (!inside || document.querySelector("dialog[open]") || !UUID.test(text)) return;
  if (event.target !== jump && typing(event.target)) return;
  event.preventDefault();
  jump.value = text;
  jumpTo(text);
});

// --- in and out -------------------------------------------------------------------------------------------------------

function enter() {
  inside = true;
  for (const name of FOR_PEOPLE) navigation[name].hidden = Boolean(me.machine_id) || (name === "keys" && !may("keys:read"));
  fill(who, icon("key"), h("span", null, theirs(me.name || me.organization_id || "key")));
  who.setAttribute("aria-label", `Your key: ${me.name || me.organization_id || "unnamed"}`);
  document.body.prepend(bar, banner);
  document.body.append(fill(foot, `Times are in your zone, ${zone()}. A time's title has UTC.`));
  show();
  if (me.known && parked?.organization === me.organization_id) showAgain(parked.dialogs);
  parked = null;
}

/** `organization` is whose key it was. What was typed into a dialog waits for another key of it, if this one was refused. */
function leave(why, organization = "") {
  inside = false;
  poll.set(null);
  parked = why === "refused" && organization ? { organization, dialogs: park() } : null;
  if (parked) setTimeout((those) => parked === those && (parked = null), IDLE_MS, parked);
  view?.destroy?.();
  view = null;
  forget();
  for (const dialog of document.querySelectorAll("dialog")) dialog.close();
  bar.remove();
  banner.remove();
  foot.remove();
  fill(banner);
  drawn = "";
  jump.value = "";
  hush();
  titleIs(signInView(main, why, enter));
}

async function start() {
  document.body.append(main);
  installVoice();
  watchKey(leave);
  poll.changed = drawPulse;
  setInterval(() => inside && drawPulse(), 500);
  addEventListener("hashchange", show);
  const { key, idle } = storedKey();
  if (!key) {
    leave(idle ? "idle" : "");
    return;
  }
  fill(main, h("p.faint.centre", null, "Signing in …"));
  try {
    await signIn(key);
  } catch (error) {
    if (error.status === 401) {
      signOut("refused");
      return;
    }
    fill(main, notice("warn", "Nothing can be shown", h("p", null, error.message), h("button", { type: "button", onclick: () => location.reload() }, "Try again")));
    return;
  }
  if (!checkIdle()) enter();
}

start();
