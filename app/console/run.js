// One run: what it is now, what it was given, its attempts, its events, and the Retry button with what stands in its way.

import { aborted, call, may, me, newIdempotencyKey, page, poll, save } from "./api.js";
import { bar, bytes, copy, copyButton, count, fill, h, icon, keeping, minute, notice, now, openDialog, reason, say, short, silent, skeleton, status, theirs, time, timestamp, toast, took } from "./dom.js";
import { comparison } from "./compare.js";
import { historyView, inPieces, json, picturesOf, prose, safely, strip, thumbnail } from "./history.js";
import { anyMachine, heldNotice, moment, openMove, openTarget, plannedNotice } from "./later.js";
import * as names from "./names.js";
import { neighbours } from "./runs.js";
import { called, openRetry } from "./retry.js";
import { deliveryList, loadEndpoints } from "./webhooks.js";

const TABS = { now: "Now", inputs: "Inputs", attempts: "Attempts", events: "Events", webhooks: "Webhooks", json: "JSON" };
const TERMINAL = new Set(["success", "error", "task_failed", "cancelled"]);
// A retry with overrides can still work: the dialog says which.
const MENDABLE = new Set(["sensitive_inputs_expired", "input_attachments_expired", "machine_not_found", "pool_not_found", "session_not_found"]);
// All that a run shows but its history, which is read in pages: it can have dozens of screenshots.
const FIELDS =
  "machine_id,assigned_machine_id,user_id,organization_id,scheduling_reason,not_before,attempt,assignment,traceparent,is_priority,error,error_code,output_data,output_attachment_ids,input_attachment_ids,input_values,sensitive_input_aliases,pool_ids,session_id,session_alias,release_session_after,started_at,ended_at,changed_at,next_retry_at,retries_left,last_report_at,is_reporting,main_prompt,model_metadata,usage_metadata,post_run_checks,workflow_version";
const BEYOND = 2 ** 31 - 1; // after all messages: such a page has their number alone
const UNREAD = { attempt: 0, of: "", key: "", from: 0, total: 0, messages: [] };
const AT_FIRST = 3; // messages that are asked for before all others: the last ones
const LATEST = 60; // that are asked for without being wanted
const DRY_MS = 10_000;
const EVENTS = 500;
const EVENT_MS = 30_000;

export function runView(root, first, app) {
  const { id } = first;
  let tab = Object.hasOwn(TABS, first.tab) ? first.tab : "now";
  let wantsRetry = first.params.has("retry");
  let run = null;
  let text = "";
  let version = ""; // the tag of the reply that `text` is
  let story = UNREAD; // the history from message `from` on
  let whole = { of: "", run: null }; // for the JSON, with the history
  let attachments = null; // by id
  let [historyOf, historyNode] = ["", null]; // the messages as they are drawn, and of which story
  let attempts = null;
  let events = null;
  let [causeOf, cause] = ["", null]; // the event that planned this attempt's retry, or cancelled it
  let endpoints = new Map(); // of webhooks, by id
  let sent = null; // deliveries of its endings
  let plan = null; // the dry run of a plain retry; undefined if the service has none
  let planAt = 0;
  let planFor = "";
  let dialog = null;

  const head = h("div.runhead");
  // The heading and the button stay the same ones: they may have the focus.
  const heading = h("h1", { tabindex: -1 }, "Run ", short(id));
  const about = h("p.meta");
  const title = h("div.title", null, heading, about);
  const actions = h("div.actions");
  const tabs = h("nav.tabs", { "aria-label": "About this run" }, Object.entries(TABS).map(([name, label]) => h("a", { href: `#/runs/${id}/${name}`, "data-tab": name }, label)));
  const panel = h("div.panel");
  fill(head, title, actions);
  const [previous, next] = neighbours(id);
  const beside = (other, label) => (other ? h("a.back", { href: `#/runs/${other}` }, label) : null);
  fill(root, h("nav.line", { "aria-label": "The list" }, h("a.back", { href: app.lastList() }, icon("back"), "Runs"), beside(previous, "Previous run"), beside(next, "Next run")), head, tabs, panel);
  fill(about, h("span.faint", null, "Loading …"));
  fill(panel, skeleton(6));
  markTab();
  const keepTitle = keeping(about);
  const button = h("button.primary", { type: "button", "aria-keyshortcuts": "r", onclick: retry }, icon("retry"), "Retry …");
  const cancelButton = h("button", { type: "button", onclick: cancel }, "Cancel run …");
  const obstacleText = h("p.obstacle", { id: "obstacle" });
  let keepPanel = keeping(panel);
  const compared = comparison(id, author);
  const deliveries = h("div");
  const drawDeliveries = deliveryList(
    deliveries,
    (one) => [h("a", { href: `#/webhooks/${one.endpoint_id}` }, theirs(endpoints.get(one.endpoint_id)?.url ?? "an endpoint")), h("span.faint", null, ` attempt ${one.attempt}`)],
    (one) => endpoints.get(one.endpoint_id)?.disabled === false,
  );
  for (const link of tabs.children) if (link.dataset.tab === "webhooks") link.hidden = Boolean(me.machine_id);

  function markTab() {
    for (const link of tabs.children) {
      if (link.dataset.tab === tab) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  // --- rounds ---------------------------------------------------------------------------------------------------------

  async function round(signal) {
    let reply;
    try {
      reply = await call("GET", `runs/${id}`, { query: { fields: FIELDS }, known: version, signal });
    } catch (error) {
      if (error.code !== "run_not_found") throw error;
      run = null;
      text = version = "";
      await loadEvents(signal);
      showGone();
      throw error;
    }
    if (reply.data) take(reply);
    poll.heard();
    await Promise.all([
      loadHistory(signal),
      tab === "json" ? loadWhole(signal) : null,
      names.loadMissing("workflows", [run.workflow_id], signal),
      names.loadMissing("machines", [run.machine_id, run.assigned_machine_id], signal),
      names.loadMissing("pools", run.pool_ids ?? [], signal),
      loadAttachments(signal),
      tab === "attempts" ? loadAttempts(signal) : null,
      tab === "events" ? loadEvents(signal) : null,
      tab === "webhooks" && !me.machine_id ? loadSent(signal) : null,
      loadPlan(signal),
      loadCause(signal),
    ]);
    draw();
  }

  function take({ data, text: raw, tag: of }) {
    if (text === raw) return;
    const before = run;
    const { run_message_history: _history, ...shown } = data;
    [run, text, version] = [shown, raw, of];
    if (story.attempt !== run.attempt) story = UNREAD;
    if (before && (before.status !== run.status || before.attempt !== run.attempt)) {
      say(`Attempt ${run.attempt}: ${run.status}`);
      planAt = 0;
    }
    draw();
    if (wantsRetry) {
      wantsRetry = false;
      history.replaceState(null, "", `#/runs/${id}/${tab}`);
      retry();
    }
  }

  /** The messages that are not known yet: the last ones first. */
  async function loadHistory(signal) {
    const of = version;
    if (of && story.of === of) return;
    const { data } = await call("GET", `runs/${id}/history`, { query: { after: BEYOND, limit: 1 }, signal });
    const goesOn = data.attempt === story.attempt && data.total >= story.total && run.status === "running";
    const next = goesOn ? { ...story, messages: [...story.messages] } : { attempt: data.attempt, from: data.total, messages: [] };
    if (goesOn) next.messages.push(...(await messages(next.total, data.total, signal)));
    else await loadBefore(next, data.total - AT_FIRST, signal);
    next.total = data.total;
    tell(next);
    if (next.from && next.total - next.from < LATEST) {
      const more = { ...next, messages: [...next.messages] };
      await loadBefore(more, more.total - LATEST, signal);
      tell(more);
    }
    story.of = of;
  }

  /** `key` stays when a reader asks for earlier messages: what was drawn is not drawn again then. */
  function tell(known) {
    story = { ...known, of: "", key: JSON.stringify([known.attempt, known.from, known.total, version]) };
    draw();
  }

  /** Those from one message up to another, in pages that the service bounds by bytes. */
  async function messages(from, end, signal) {
    const found = [];
    for (let after = from; after < end; ) {
      const { data } = await call("GET", `runs/${id}/history`, { query: { after, limit: Math.min(1000, end - after) }, signal });
      if (!data.items.length) break;
      found.push(...data.items);
      after += data.items.length;
    }
    return found;
  }

  async function loadBefore(known, from, signal) {
    const begin = Math.max(0, from);
    known.messages.unshift(...(await messages(begin, known.from, signal)));
    known.from = begin;
  }

  async function loadWhole(signal) {
    const of = version;
    if (of && whole.of === of) return;
    const reply = await call("GET", `runs/${id}`, { signal });
    whole = { of, run: reply.data };
  }

  async function loadAttachments(signal) {
    const wanted = [...run.input_attachment_ids, ...run.output_attachment_ids];
    if (attachments && wanted.every((one) => attachments.has(one))) return;
    const { data } = await page("run-attachments", { query: { run_id: id, limit: 1000 }, signal });
    attachments = new Map(data.items.map((item) => [item.id, item]));
  }

  async function loadAttempts(signal) {
    const { data } = await page(`runs/${id}/attempts`, { query: { limit: 1000 }, signal });
    attempts = data.items;
    await names.loadMissing("machines", attempts.map((attempt) => attempt.machine_id), signal);
  }

  async function loadSent(signal) {
    const [known, { data }] = await Promise.all([loadEndpoints(signal), call("GET", `runs/${id}/webhook-deliveries`, { signal })]);
    [endpoints, sent] = [known, data];
  }

  /** The latest, newest first; the API has them oldest first. */
  async function loadEvents(signal) {
    const from = async (skip) => (await page(`runs/${id}/events`, { query: { limit: EVENTS, skip }, signal })).data;
    try {
      let data = await from(0);
      if (data.total > data.items.length) data = await from(data.total - data.items.length);
      events = data.items.reverse();
    } catch (error) {
      if (error.status !== 404) throw error;
      events = error.code === "route_not_found" ? undefined : [];
    }
  }

  /** Asked once for each attempt that the policy retries, or that was cancelled. */
  async function loadCause(signal) {
    const { attempt } = run;
    const of = run.next_retry_at ? `retry_planned ${attempt}` : run.status === "cancelled" ? `ended ${attempt}` : "";
    if (causeOf === of) return;
    if (of) await loadEvents(signal);
    cause = (of && events?.find((event) => `${event.event} ${event.attempt}` === of)) || null;
    if (cause || !of || now() - Date.parse(run.changed_at) > EVENT_MS) causeOf = of; // an event shows a moment after its change
  }

  /** What a plain retry would do, asked when the run has moved and now and then besides: secrets expire by themselves. */
  async function loadPlan(signal) {
    if (!may("runs:write")) return;
    const of = `${run.status}${run.attempt}`;
    if (planFor === of && now() - planAt < DRY_MS) return;
    plan = await dryRun(id, {}, signal);
    [planFor, planAt] = [of, now()];
  }

  /** Events outlive their run: they tell who deleted it. */
  function showGone() {
    dialog?.close();
    keepTitle(["gone"], () => []);
    fill(heading, "Run ", short(id));
    fill(actions);
    tabs.hidden = true;
    keepPanel(["gone", events], () => [
      events?.length
        ? notice("warn", "This run was deleted", h("p", null, "Its outputs, files and secrets are gone. What happened to it, is kept:"))
        : notice("warn", "No run with this id", h("p", null, "It belongs to another organization, or the address is wrong: ", h("span.id", null, id)), h("a.button", { href: app.lastList() }, "To the runs")),
      events?.length ? drawEvents() : null,
    ]);
  }

  // --- drawing --------------------------------------------------------------------------------------------------------

  function draw() {
    if (!run || !root.isConnected) return;
    tabs.hidden = false;
    const { output_data: _output, ...small } = run;
    const called = [names.nameOf("workflows", run.workflow_id), run.machine_id && names.nameOf("machines", run.machine_id)];
    if (keepTitle([small, called, Boolean(silent(run))], drawTitle)) app.titled();
    drawActions();
    const shown = {
      // What has ended names no machine and no pool here: it stays as it was unfolded when their names arrive.
      now: [text, cause, Boolean(silent(run)), story.key, TERMINAL.has(run.status) ? null : [called, run.pool_ids?.map((pool) => names.nameOf("pools", pool))], [...(attachments?.keys() ?? [])]],
      inputs: [small, called, plan?.secrets, [...(attachments?.keys() ?? [])], run.pool_ids?.map((pool) => names.nameOf("pools", pool))],
      attempts: [small, called, attempts, attempts?.map((one) => one.machine_id && names.nameOf("machines", one.machine_id))],
      events: [events === undefined ? "none" : events],
      webhooks: [sent === null],
      json: [text, whole.of],
    }[tab];
    if (sent) drawDeliveries(sent.items, { of: [run.status, [...endpoints.values()].map((one) => [one.url, one.disabled])], empty: nothingSent() });
    const drawTab = { now: drawNow, inputs: drawInputs, attempts: drawAttempts, events: drawEvents, webhooks: drawSent, json: drawJson }[tab];
    keepPanel([tab, shown], () => safely(drawTab, run));
  }

  function drawTitle() {
    const began = run.started_at && Date.parse(run.started_at);
    const ended = run.ended_at && Date.parse(run.ended_at);
    fill(heading, status(run.status), names.named("workflows", run.workflow_id));
    return [
      h("span", null, h("span.id", null, run.id), copyButton(() => run.id, "the id")),
      h("span", null, `attempt ${run.attempt}`),
      run.machine_id ? h("span", null, icon("machine"), h("a", { href: `#/runs?machine=${run.machine_id}` }, names.named("machines", run.machine_id)), run.assigned_machine_id || TERMINAL.has(run.status) ? null : " (chosen, not assigned yet)") : null,
      run.is_priority ? h("span.tag", null, "priority") : null,
      run.session_id ? h("span", null, "session ", h("a", { href: `#/runs?session=${run.session_id}` }, run.session_alias ? theirs(run.session_alias) : short(run.session_id))) : null,
      h("span", null, "created ", time(run.created_at)),
      run.status === "running" && began ? h("span", null, "running for ", time(run.started_at, "since")) : null,
      run.not_before ? h("span", null, "starts at ", moment(run.not_before)) : null,
      run.next_retry_at ? h("span", null, "next attempt at ", moment(run.next_retry_at)) : null,
      silent(run) ? h(`span.${silent(run).isAmber ? "wait" : "faint"}`, null, icon("warn"), "no report for ", silent(run).time) : null,
      ended ? h("span", null, "ended ", time(run.ended_at), began ? `, ran ${took(ended - began)}` : null) : null,
    ];
  }

  /** The button is always there; what stands in its way stands beside it. */
  function drawActions() {
    const [why, hard] = obstacle();
    if (!button.isConnected) fill(actions, obstacleText, cancelButton, button);
    cancelButton.hidden = TERMINAL.has(run.status) || !may("runs:write");
    obstacleText.hidden = !why;
    obstacleText.classList.toggle("soft", !hard);
    if (why && obstacleText.textContent !== why) fill(obstacleText, icon(hard ? "info" : "warn"), h("span", null, why));
    if (hard) button.setAttribute("aria-disabled", "true");
    else button.removeAttribute("aria-disabled");
    if (why) button.setAttribute("aria-describedby", "obstacle");
    else button.removeAttribute("aria-describedby");
  }

  /** Why Retry cannot work, and whether the dialog could not help either. */
  function obstacle() {
    if (me.machine_id) return ["This key belongs to a machine: it looks at that machine's runs, and retries none.", true];
    if (!may("runs:write")) return ["This key may look, and not retry: it lacks the scope runs:write.", true];
    if (!TERMINAL.has(run.status)) return [run.status === "running" ? "It is running. Retry works when it has ended; cancel it if its executor died." : run.not_before ? "It is held until its start time. Retry works when it has ended." : "It is waiting for a machine. Retry works when it has ended.", true];
    if (!plan || plan.would_retry || planFor !== `${run.status}${run.attempt}`) return [null, false];
    const hard = plan.refusals.filter((refusal) => !MENDABLE.has(refusal.code));
    return [(hard[0] ?? plan.refusals[0]).detail, hard.length > 0];
  }

  async function retry() {
    if (!run || dialog) return;
    if (obstacle()[1]) {
      say(obstacle()[0]);
      return;
    }
    dialog = { close() {} }; // one at a time, also while the files are asked for
    try {
      await loadAttachments();
    } catch (error) {
      dialog = null;
      if (!aborted(error)) toast(error.message, "bad");
      return;
    }
    if (!root.isConnected || !me.key) return;
    dialog = openRetry({
      run,
      attachments: run.input_attachment_ids.map((one) => attachments?.get(one)).filter(Boolean),
      plan: planFor === `${run.status}${run.attempt}` ? plan : null,
      dryRun: plan === undefined ? null : (body, signal) => dryRun(id, body, signal),
      done(reply) {
        take(reply);
        plan = null;
        planAt = 0;
        toast(run.not_before ? `Attempt ${run.attempt} starts at ${minute(run.not_before)}` : `Attempt ${run.attempt} is queued`);
        poll.now(true);
      },
      closed() {
        dialog = null;
        planAt = 0;
        if (root.isConnected && me.key) {
          poll.now(true);
          button.focus();
        }
      },
    });
  }

  function cancel() {
    const input = h("input", { type: "text", maxlength: 500, id: "cancel-reason", autocomplete: "off" });
    const problem = h("p.error", { role: "alert" });
    const key = newIdempotencyKey();
    const act = h("button.danger", { type: "button" }, "Cancel run");
    const box = openDialog({
      title: "Cancel this run?",
      className: "small",
      body: [
        h("p", null, run.status === "running" ? "Its executor hears of it at its next report, and its machine is free at once. What it has done in the application stays done." : "It leaves the queue. It can be retried later."),
        h("label", { htmlFor: "cancel-reason" }, "Reason (optional, others see it)"),
        input,
        problem,
      ],
      foot: [act, h("button", { type: "button", onclick: () => box.close() }, "Leave it")],
    });
    act.addEventListener("click", async () => {
      if (act.disabled) return;
      act.disabled = true;
      fill(problem);
      try {
        const body = { status: "cancelled", ...(input.value.trim() ? { reason: input.value.trim() } : {}) };
        take(await call("PATCH", `runs/${id}`, { body: JSON.stringify(body), idempotencyKey: key }));
        toast("The run is cancelled");
        box.close();
        poll.now(true);
      } catch (error) {
        act.disabled = false;
        if (!aborted(error)) fill(problem, error.message);
      }
    });
  }

  // --- now ------------------------------------------------------------------------------------------------------------

  function drawNow() {
    const outputs = run.output_attachment_ids;
    const parts = [];
    const acts = may("runs:write");
    if (run.status === "scheduling" && run.not_before) parts.push(heldNotice(run, { where: whereto(), acts, changed }));
    else if (run.status === "scheduling") {
      parts.push(
        notice(
          "info",
          run.scheduling_reason ? reason(run.scheduling_reason) : "Waits",
          h("p", null, whereto(), " ", h("a", { href: "#/queue" }, "See the queue")),
          acts && !run.assigned_machine_id
            ? h("div.line", null, h("button", { type: "button", onclick: () => openMove(run, changed) }, "Start later …"), h("button", { type: "button", onclick: () => openTarget(run, changed) }, "Other machine …"), run.machine_id || run.pool_ids?.length ? anyMachine(run, changed) : null)
            : null,
        ),
      );
    }
    if (run.next_retry_at) {
      parts.push(plannedNotice(run, { because: cause?.reason, policy: h("a", { href: `#/workflows/${run.workflow_id}` }, "retry policy"), acts, changed }));
    }
    const quiet = silent(run);
    if (quiet?.isAmber) parts.push(notice("warn", ["No report for ", quiet.time], h("p", null, "Its executor has reported before and is silent now: look at ", run.machine_id ? names.named("machines", run.machine_id) : "its machine", ". If it is dead, cancel the run and retry it.")));
    if (run.status === "running") parts.push(notice("info", ["Running", run.machine_id ? [" on ", names.named("machines", run.machine_id)] : null], h("p", null, run.started_at ? ["For ", time(run.started_at, "since"), ". "] : null, quiet && !quiet.isAmber ? ["No report for ", quiet.time, ". "] : null, "What it has reported so far stands below.")));
    if (run.status === "cancelled") parts.push(cancelledNotice());
    const pictures = picturesOf(story.messages, story.from);
    if (run.error?.length) {
      const lines = inPieces(run.error, (line) => h("div.failure", null, icon("error"), h("div", null, prose(line))));
      const last = pictures.at(-1);
      parts.push(
        section("What went wrong", last ? h("div.beside", null, h("div.lines", null, lines), h("figure", null, thumbnail(pictures, pictures.length - 1), h("figcaption.faint", null, `The last picture, in message ${last.index + 1}`))) : lines),
      );
    }
    if (run.output_data !== null) parts.push(section("Result", json(run.output_data, "Result")));
    if (outputs.length) parts.push(section(count(outputs.length, "file"), files(outputs)));
    if (story.total) parts.push(section(`History, ${count(story.total, "message")}`, shownHistory(pictures)));
    if (!parts.length && !story.key) parts.push(skeleton(3));
    if (!parts.length) parts.push(notice("info", "Nothing was reported", h("p", null, "No error, no result, no files and no history: its executor sent none.")));
    return parts;
  }

  /** The same node while the run is the same: messages that were unfolded stay unfolded when its files arrive. */
  function shownHistory(pictures) {
    if (historyOf === story.key) return historyNode;
    const toEnd = h("button.quiet", { type: "button", onclick: toTheEnd }, icon("down"), "To the end");
    [historyOf, historyNode] = [story.key, h("div.lines", null, story.total > 3 ? h("div", null, toEnd) : null, strip(pictures), historyView(story, (from) => loadBefore(story, from)))];
    return historyNode;
  }

  function toTheEnd() {
    const last = historyNode.querySelector(".history > li:last-of-type");
    last.tabIndex = -1;
    last.scrollIntoView({ block: "end" });
    last.focus({ preventScroll: true });
  }

  /** Who cancelled it, when, and why. */
  function cancelledNotice() {
    const by = cause ? ["Cancelled by ", author(cause.key_id, cause.user_id, cause.by, cause.by_key_name), ", ", time(cause.at)] : ["Cancelled ", time(run.ended_at ?? run.changed_at)];
    return notice("cancelled", [by, cause?.reason ? [": ", theirs(cause.reason)] : ""], h("p", null, run.output_data === null && !run.error?.length && !story.total ? "Its executor had reported nothing." : "What its executor had reported stands below."));
  }

  function whereto() {
    if (run.machine_id) return ["For ", names.named("machines", run.machine_id), "."];
    if (run.pool_ids?.length) return ["For a machine in ", run.pool_ids.map((pool, index) => [index ? " and " : "", names.named("pools", pool)]), "."];
    return "For any machine.";
  }

  /** After a request that answered with the run. */
  function changed(reply) {
    take(reply);
    poll.now(true);
  }

  function section(heading, ...content) {
    return h("section", null, h("h2", null, heading), content);
  }

  function files(ids) {
    return inPieces(
      ids,
      (one) => {
        const file = attachments?.get(one);
        if (!file) return h("li", null, icon("file"), short(one));
        const expired = file.expires_at && Date.parse(file.expires_at) <= now();
        return h(
          "li",
          null,
          icon("file"),
          h("span.grow", null, theirs(file.filename), file.target_path ? h("span.faint", null, " to ", theirs(file.target_path)) : null),
          h("span.faint", null, bytes(file.size_bytes)),
          file.expires_at ? h("span.faint", null, time(file.expires_at, "left")) : null,
          expired ? null : h("button.quiet", { type: "button", onclick: (event) => download(event.currentTarget, file) }, "Download", h("span.unseen", null, " ", file.filename)),
        );
      },
      "ul.files",
    );
  }

  async function download(button, file) {
    button.disabled = true;
    try {
      await save(file);
    } catch (error) {
      if (!aborted(error)) toast(error.message, "bad");
    }
    button.disabled = false;
  }

  // --- inputs ---------------------------------------------------------------------------------------------------------

  function drawInputs() {
    const values = Object.entries(run.input_values ?? {});
    const aliases = Object.entries(run.sensitive_input_aliases ?? {});
    return [
      section(
        "Values",
        values.length
          ? inPieces(values, ([name, value]) => [h("dt", null, theirs(name)), h("dd", null, typeof value === "string" ? prose(value) : json(value, `Value of ${name}`))], "dl.values")
          : h("p.faint", null, "None."),
      ),
      section(
        "Secrets",
        aliases.length
          ? [
              h("p.faint", null, "The service cannot read them: it knows their names and where they are in Vault. ", keptUntil()),
              inPieces(aliases, ([name, alias]) => [h("dt", null, icon("key"), theirs(name)), h("dd", null, h("code.alias", null, theirs(alias)))], "dl.values"),
            ]
          : h("p.faint", null, "None."),
      ),
      section("Files", run.input_attachment_ids.length ? files(run.input_attachment_ids) : h("p.faint", null, "None.")),
      section(
        "Where it runs",
        h(
          "dl.facts",
          null,
          h("dt", null, "Machine"),
          h("dd", null, run.machine_id ? [names.named("machines", run.machine_id), " ", h("span.id", null, run.machine_id)] : h("span.faint", null, "any")),
          h("dt", null, "Pools"),
          h("dd", null, run.pool_ids?.length ? run.pool_ids.map((pool, index) => [index ? ", " : "", names.named("pools", pool)]) : h("span.faint", null, "any")),
          h("dt", null, "Session"),
          h("dd", null, run.session_id ? [h("span.id", null, run.session_id), run.session_alias ? [" ", theirs(run.session_alias)] : null, run.release_session_after ? ", released after this run" : null] : h("span.faint", null, "none")),
          h("dt", null, "Priority"),
          h("dd", null, run.is_priority ? "yes" : "no"),
        ),
      ),
    ];
  }

  function keptUntil() {
    if (!TERMINAL.has(run.status)) return "They are kept while the run is active.";
    const expired = plan?.refusals?.some((refusal) => refusal.code === "sensitive_inputs_expired");
    if (expired) return h("strong.bad", null, "They have expired: a retry needs new ones.");
    const until = plan?.secrets?.kept_until;
    return until ? ["For a retry they are kept until ", timestamp(until), " (", time(until, "left"), ")."] : null;
  }

  // --- attempts -------------------------------------------------------------------------------------------------------

  function drawAttempts() {
    if (!attempts) return skeleton(4);
    const past = [...attempts].sort((one, other) => one.attempt - other.attempt);
    const all = [...past, { ...run, machine_id: run.assigned_machine_id ?? (TERMINAL.has(run.status) ? run.machine_id : null), current: true }];
    const lives = all.map((attempt, index) => {
      const cause = index ? past[index - 1] : null; // the retry that made this attempt is told by the one it replaced
      const queued = Date.parse(cause ? cause.retried_at : run.created_at);
      const end = attempt.ended_at ? Date.parse(attempt.ended_at) : attempt.current && !TERMINAL.has(run.status) ? now() : null;
      const start = attempt.started_at ? Date.parse(attempt.started_at) : end;
      return { attempt, cause, waited: start === null ? 0 : Math.max(0, start - queued), ran: attempt.started_at && end !== null ? Math.max(0, end - start) : 0, queued };
    });
    const longest = Math.max(1, ...lives.map((life) => life.waited + life.ran));
    const list = h(
      "ol.attempts",
      { reversed: true },
      lives.toReversed().map(({ attempt, cause, waited, ran, queued }) =>
        h(
          "li",
          { value: attempt.attempt },
          h(
            "header",
            null,
            h("b", null, `Attempt ${attempt.attempt}`),
            status(attempt.status),
            attempt.machine_id ? h("span", null, icon("machine"), names.named("machines", attempt.machine_id)) : null,
            h("span.faint.end", null, cause ? "retried " : "created ", time(new Date(queued).toISOString())),
          ),
          h("div.life", null, bar(waited / longest, "waited"), bar(ran / longest, "ran"), h("span.faint", null, attempt.started_at ? `waited ${took(waited)}, ran ${took(ran)}` : `waited ${took(waited)}, never started`)),
          cause
            ? h(
                "p.meta",
                null,
                h("span", null, "by ", author(cause.retried_by_key_id, cause.retried_by_user_id, cause.by, cause.retried_by_key_name)),
                cause.reason ? h("span", null, "“", theirs(cause.reason), "”") : null,
                h("span", null, cause.overridden.length ? ["changed ", cause.overridden.map((name) => tag(name))] : "changed nothing"),
              )
            : null,
          attempt.end_reason ? h("p.meta", null, h("span", null, "ended because “", theirs(attempt.end_reason), "”")) : null,
          attempt.error?.length ? h("div.failure", null, icon("error"), h("div", null, attempt.error.slice(0, 3).map((line) => prose(line)), attempt.error.length > 3 ? h("p.faint", null, `and ${attempt.error.length - 3} more`) : null)) : null,
        ),
      ),
    );
    return [compared(lives), list];
  }

  function tag(key) {
    return h("span.tag", { title: key }, called(key));
  }

  function author(key, user, by, name) {
    if (by === "policy") return ["the ", h("a", { href: `#/workflows/${run?.workflow_id ?? ""}` }, "retry policy")];
    if (!key && !user) return "the service";
    if (key && key === me.key_id) return "you (this key)";
    return [user ? ["user ", short(user), key ? ", " : null] : null, key ? ["key ", name ? h("span", { title: key }, theirs(name)) : short(key)] : null];
  }

  // --- events ---------------------------------------------------------------------------------------------------------

  function drawEvents() {
    if (events === undefined) return notice("info", "This service keeps no events", h("p", null, "It does not answer this address yet. The attempts tell who retried, and when."));
    if (events === null) return skeleton(4);
    if (!events.length) return notice("info", "No events are left", h("p", null, "They are kept for a time that the service's operator chose."));
    return h(
      "ol.events",
      null,
      events.map((event) =>
        h(
          "li",
          null,
          timestamp(event.at),
          h(
            "div",
            null,
            h("b", null, String(event.event).replaceAll("_", " ")),
            ` attempt ${event.attempt}`,
            event.from_status !== event.to_status ? h("span.faint", null, ` ${event.from_status ?? "–"} → ${event.to_status ?? "–"}`) : null,
            h(
              "p.meta",
              null,
              h("span", null, "by ", author(event.key_id, event.user_id, event.by, event.by_key_name)),
              event.bulk_retry_id ? h("span", null, "in ", h("a", { href: `#/bulk/${event.bulk_retry_id}` }, "bulk retry ", short(event.bulk_retry_id))) : null,
              event.code ? h("span", null, "because of ", h("code", null, theirs(event.code))) : null,
              event.reason ? h("span", null, "“", theirs(event.reason), "”") : null,
              event.changed?.length ? h("span", null, "changed ", event.changed.map((name) => tag(name))) : null,
              event.request_id ? h("span.faint", null, "request ", h("span.id", null, theirs(event.request_id))) : null,
            ),
          ),
        ),
      ),
    );
  }

  // --- webhooks -------------------------------------------------------------------------------------------------------

  function drawSent() {
    return sent === null ? skeleton(3) : [deliveries, sent.total > sent.items.length ? h("p.faint", null, `The latest ${sent.items.length} of ${sent.total.toLocaleString()}.`) : null];
  }

  function nothingSent() {
    const wanted = names.get("workflows", run.workflow_id)?.is_webhooks_enabled;
    const why = wanted === false ? "Its workflow does not send any: is_webhooks_enabled is off." : !endpoints.size ? ["There is no endpoint. ", h("a", { href: "#/webhooks" }, "Webhooks")] : TERMINAL.has(run.status) ? "It ended before there was an endpoint, or that is longer ago than messages are kept." : "A message is sent when it ends.";
    return notice("info", "Nothing was sent", h("p", null, why));
  }

  // --- JSON -----------------------------------------------------------------------------------------------------------

  function drawJson() {
    const url = new URL(`../v1/runs/${id}`, location.href.split("#")[0]);
    const curl = `curl -sS ${url} -H "Authorization: Bearer $API_KEY"`;
    const python = `import os\n\nimport httpx\n\nreply = httpx.get("${url}", headers={"Authorization": f"Bearer {os.environ['API_KEY']}"})\nreply.raise_for_status()\nprint(reply.json())\n`;
    return [
      h(
        "div.line",
        null,
        copyButton(() => JSON.stringify(whole.run ?? run, null, 2), "the JSON", "Copy"),
        h("button.quiet", { type: "button", onclick: () => copy(curl, "curl") }, icon("copy"), "Copy as curl"),
        h("button.quiet", { type: "button", onclick: () => copy(python, "Python") }, icon("copy"), "Copy as Python"),
      ),
      whole.run ? json(whole.run, "The run as the API shows it") : skeleton(6),
    ];
  }

  return {
    title: () => (run ? `${run.status}: ${names.nameOf("workflows", run.workflow_id)}` : `Run ${id.slice(0, 8)}`),
    change(to) {
      if (to.params.has("retry") && run) {
        history.replaceState(null, "", `#/runs/${id}/${tab}`);
        retry();
      }
      const next = Object.hasOwn(TABS, to.tab) ? to.tab : "now";
      if (next === tab) return;
      tab = next;
      markTab();
      keepPanel = keeping(panel);
      draw();
      poll.now(true);
    },
    round,
    handles: (problem) => problem.code === "run_not_found",
    keys: { r: retry },
    destroy: () => dialog?.close(),
  };
}

/** The service's answer to what a retry with this body would do; undefined if it has no such answer. Raises Problem. */
export async function dryRun(id, body, signal) {
  try {
    // A replica of a version that does not know `dry_run` would retry in earnest. It refuses a key with a space in it; a dry run
    // ignores all keys.
    const { data } = await call("POST", `runs/${id}/retry`, { query: { dry_run: "true" }, body: JSON.stringify(body), idempotencyKey: "dry run", signal });
    return data;
  } catch (error) {
    if (error.errors?.[0]?.loc[0] === "header") return undefined;
    throw error;
  }
}
