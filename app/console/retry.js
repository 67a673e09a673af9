// The retry dialog. It asks what would happen while one chooses, and sends one request under one Idempotency-Key: pressed twice, or
// sent again because the reply was lost, it is one retry.

import { Unreachable, aborted, call, newIdempotencyKey } from "./api.js";
import { ascii, copy, count, entryOf, fill, h, icon, notice, openDialog, reason, say, skeleton, span, theirs, time, timestamp } from "./dom.js";
import { FieldError, filesField, priorityField, reasonField, secretsField, sessionField, startField, targetField, valuesField } from "./fields.js";
import * as names from "./names.js";

const QUIET_MS = 300; // after the last change
const AGAIN_MS = 5000; // while it would be refused: that may change by itself
const SLOWEST_SECONDS = 30;
const SENT_AT_MOST = 10; // then somebody has to want it
const SEND_SECONDS = 120; // without files; with files as long as they take

const WORDS = {
  input_values: "values",
  sensitive_input_values: "secrets",
  sensitive_input_aliases: "secrets",
  file_inputs: "files",
  input_attachments: "files",
  input_attachment_ids: "files",
  machine_id: "machine",
  pool_ids: "pools",
  session_id: "session",
  session_alias: "name in the session",
  release_session_after: "release of the session",
  is_priority: "priority",
  reuse_session: "session",
  start_session: "session",
  not_before: "start",
};

/** What people call a key of a retry. */
export function called(key) {
  return entryOf(WORDS, key) ?? theirs(key);
}

/**
 * Opens it for a finished run. `plan` is what is known of a plain retry already, `dryRun(body, signal)` asks (null if the service
 * cannot be asked), `done(reply)` gets the run as it is after the retry.
 */
export function openRetry({ run, attachments, plan, dryRun, done, closed }) {
  const idempotencyKey = newIdempotencyKey();
  const life = new AbortController();
  let state = "editing"; // editing, reading, sending, waiting, stopped
  let unknown = false; // whether a request of this dialog may have taken effect
  let sent = null; // the body on its way, until it is answered
  let wait = null; // {until, timer}
  let failures = 0;
  let untouched = true;

  // --- the fields -----------------------------------------------------------------------------------------------------

  const fields = [
    valuesField(run, changed),
    secretsField(run, plan, changed),
    filesField(attachments, changed),
    targetField(run, changed),
    sessionField(run, changed),
    priorityField(run, changed),
    startField(changed),
    reasonField(),
  ];
  const [, secrets, files, target] = fields;
  const form = h("form.fields", { novalidate: true, autocomplete: "off", onsubmit: (event) => (event.preventDefault(), press()), oninput: changed }, fields.map((field) => field.node));
  /** What a plain retry is refused for is what somebody opens this for. */
  function preset(answer) {
    for (const { code } of answer.refusals) {
      if (code === "sensitive_inputs_expired") secrets.set("change");
      if (code === "input_attachments_expired") files.set("change");
    }
    untouched = false;
  }
  if (plan) preset(plan);

  /** The body as it is sent, or with stand-ins for what only the sent one may hold. */
  async function build(stand) {
    const body = {};
    for (const field of fields) {
      if (stand === undefined || !field.putNames) await field.put(body);
      else field.putNames(body, stand(field));
    }
    return body;
  }

  // --- what will happen -----------------------------------------------------------------------------------------------

  const verdict = h("div.verdict", { "aria-live": "polite" });
  const outcome = h("div.outcome");
  const aside = h("aside", { "aria-label": "What will happen" }, h("h3", null, "What will happen"), verdict, outcome);
  let asking = null;
  let timer = 0;
  let foretold = null; // the answer for what the fields hold now

  function changed() {
    if (state !== "editing") return;
    untouched = false;
    for (const field of fields) field.clear();
    fill(trouble);
    foretold = null;
    drawButtons();
    if (dryRun) aside.classList.add("stale");
    ask(QUIET_MS);
  }

  function ask(delay) {
    clearTimeout(timer);
    asking?.abort();
    if (dryRun) timer = setTimeout(foretell, delay);
  }

  async function foretell() {
    const abort = (asking = new AbortController());
    let body;
    try {
      body = await build(() => "");
    } catch {
      delete verdict.dataset.text;
      fill(verdict, h("p.faint", null, "Something is not finished yet."));
      return; // the next change asks
    }
    try {
      const answer = await dryRun(body, abort.signal);
      if (asking !== abort || life.signal.aborted) return;
      foretold = answer;
      drawOutcome(answer);
      if (untouched && !answer.would_retry) {
        preset(answer);
        ask(0);
        return;
      }
      if (!answer.would_retry) timer = setTimeout(foretell, AGAIN_MS);
    } catch (error) {
      if (aborted(error) || asking !== abort) return;
      if (error.status === 422) markAll(error);
      aside.classList.remove("stale");
      delete verdict.dataset.text;
      fill(verdict, h("p.bad", null, icon("warn"), error.status === 422 ? "The service would not take this. What it refuses is marked." : `It could not be asked: ${error.message}`));
      if (error.status !== 422) timer = setTimeout(foretell, AGAIN_MS);
    }
    drawButtons();
  }

  function drawOutcome(answer) {
    aside.classList.remove("stale");
    const placement = answer.placement ?? {};
    const cleared = answer.cleared ?? {};
    const list = (items) => (items.length ? items.map((item, index) => [index ? ", " : "", item]) : h("span.faint", null, "nothing"));
    const words = (keys) => [...new Set((keys ?? []).map(called))];
    const stuck = answer.would_retry && placement.eligible_machines === 0 && placement.expected_reason !== "not_before";
    const [kind, drawing, text] = !answer.would_retry
      ? ["bad", "error", "It would be refused"]
      : stuck
        ? ["wait", "warn", `Attempt ${answer.attempt} will be queued, and no machine can take it now`]
        : ["good", "success", `Attempt ${answer.attempt} will be queued, under the same id`];
    if (verdict.dataset.text !== text) {
      verdict.dataset.text = text;
      const freed = h("button", { type: "button", onclick: () => (target.set("empty"), changed(), send.focus()) }, icon("machine"), "Any machine");
      fill(verdict, h(`p.${kind}`, null, icon(drawing), text), stuck && !placement.session_machine_id && (placement.pinned_machine_id || placement.pool_ids?.length) ? freed : null);
    }
    fill(
      outcome,
      answer.refusals?.length ? h("ul.refusals", null, answer.refusals.map((refusal) => h("li", null, refusal.detail))) : null,
      h(
        "dl.facts",
        null,
        h("dt", null, "Cleared"),
        h(
          "dd",
          null,
          list([
            cleared.error && "the error",
            cleared.outputs && "the result",
            cleared.history && "the history",
            cleared.output_attachments > 0 && count(cleared.output_attachments, "output file"),
          ].filter(Boolean)),
        ),
        h("dt", null, "Kept"),
        h("dd", null, list(words(answer.kept))),
        h("dt", null, "Replaced"),
        h("dd", null, list(words(answer.replaced))),
        h("dt", null, "Secrets"),
        h("dd", null, list((answer.secrets?.names ?? []).map((name) => theirs(name))), answer.secrets?.kept_until ? h("div.faint", null, "kept until ", timestamp(answer.secrets.kept_until), " (", time(answer.secrets.kept_until, "left"), ")") : null),
        h("dt", null, "Where"),
        h("dd", null, where(placement), h("div.faint", null, placement.eligible_machines === undefined ? null : `${count(placement.eligible_machines, "machine")} could take it now`)),
        placement.expected_reason ? [h("dt", null, "Then"), h("dd", null, placement.expected_reason === "assigned" ? "It starts at once" : reason(placement.expected_reason))] : null,
      ),
    );
  }

  function where({ pinned_machine_id: pinned, pool_ids: pools, session_machine_id: session }) {
    if (session) return [names.named("machines", session), " (its session's machine)"];
    if (pinned) return ["only ", names.named("machines", pinned)];
    if (pools?.length) return ["a machine in ", pools.map((pool, index) => [index ? " and " : "", names.named("pools", pool)])];
    return "any machine";
  }

  if (plan) drawOutcome(plan);
  else if (dryRun) fill(outcome, skeleton(5));
  else {
    fill(
      outcome,
      notice("info", "This service cannot say beforehand", h("p", null, `A retry clears what attempt ${run.attempt} left (error, result, history, output files), keeps what you keep, and queues attempt ${run.attempt + 1} under the same id.`)),
    );
  }

  // --- the buttons ----------------------------------------------------------------------------------------------------

  const send = h("button.primary", { type: "button", onclick: press }, icon("retry"), `Retry as attempt ${run.attempt + 1}`);
  const stop = h("button", { type: "button", hidden: true, onclick: halt }, "Stop");
  const trouble = h("div.trouble", { role: "alert" });
  const ticking = h("span.countdown", { "aria-hidden": "true" });
  const question = h("div.question", { hidden: true, role: "alertdialog", "aria-label": "Close without retrying?" });

  function drawButtons() {
    const refused = state === "editing" && foretold && !foretold.would_retry;
    if (refused) send.setAttribute("aria-disabled", "true");
    else send.removeAttribute("aria-disabled");
    send.title = refused ? foretold.refusals[0].detail : "";
    send.disabled = state === "reading" || state === "sending";
    fill(send, icon("retry"), { editing: `Retry as attempt ${run.attempt + 1}`, reading: "Reading the files …", sending: "Sending …", waiting: "Send again now", stopped: "" }[state]);
    stop.hidden = state !== "waiting" && state !== "sending";
    send.hidden = state === "stopped";
    form.inert = state !== "editing";
    form.classList.toggle("frozen", state !== "editing");
  }

  function to(next) {
    state = next;
    drawButtons();
  }

  // --- sending --------------------------------------------------------------------------------------------------------

  async function press() {
    if (state === "waiting") {
      transmit();
      return;
    }
    if (state !== "editing" || send.getAttribute("aria-disabled") === "true") return;
    for (const field of fields) field.clear();
    fill(trouble);
    const wrong = fields.map((field) => field.check()).find(Boolean);
    if (wrong) {
      wrong.focus();
      return;
    }
    ask(QUIET_MS);
    clearTimeout(timer); // nothing else is asked while it is on its way
    asking?.abort();
    to("reading");
    try {
      sent = JSON.stringify(await build());
    } catch (error) {
      to("editing");
      if (error instanceof FieldError) error.control.focus();
      else throw error;
      return;
    }
    if (life.signal.aborted) return;
    transmit();
  }

  async function transmit() {
    clearInterval(wait?.timer);
    wait = null;
    fill(ticking);
    to("sending");
    try {
      const reply = await call("POST", `runs/${run.id}/retry`, {
        body: sent,
        idempotencyKey,
        signal: life.signal,
        seconds: files.mode === "change" ? 0 : SEND_SECONDS,
      });
      sent = null;
      state = "done";
      done(reply);
      dialog.close();
    } catch (error) {
      if (!aborted(error)) failed(error);
      else if (!life.signal.aborted) interrupted(Boolean(error.refused));
    }
  }

  /** The key has gone: nothing is sent any more with what this dialog holds. `known` if that took no effect. */
  function interrupted(known) {
    clearInterval(wait?.timer);
    wait = null;
    sent = null;
    fill(ticking);
    if (known && !unknown) {
      to("editing");
      return;
    }
    fill(trouble, icon("info"), "The key was refused meanwhile. It may have been retried: close this and look at the run.");
    to("stopped");
  }

  function failed(error) {
    failures += 1;
    const lost = error instanceof Unreachable || (error.status >= 500 && !["vault_unavailable", "storage_unavailable", "overloaded"].includes(error.code));
    unknown ||= lost || error.inProgress;
    const passing = lost || error.status === 503 || error.status === 429 || error.status === 408 || error.inProgress;
    if (passing) {
      const seconds = error.retryAfter ?? Math.min(SLOWEST_SECONDS, 2 ** failures);
      fill(
        trouble,
        icon("warn"),
        h("span", null, error.message, " ", lost ? "Whether it took effect is not known. The same request is sent again, which cannot retry twice." : "Nothing is lost: the same request is sent again.", error.requestId ? h("span.faint", null, ` Request ${error.requestId}.`) : null),
      );
      if (failures < SENT_AT_MOST) countDown(seconds);
      else to("waiting");
      return;
    }
    // Decided: nothing of this dialog has taken effect, so it may be changed and sent again.
    const reused = error.errors?.some(({ loc }) => loc[0] === "header");
    if (!reused) {
      unknown = false;
      sent = null;
    }
    failures = 0;
    to(reused ? "stopped" : "editing");
    if (reused) {
      fill(trouble, icon("info"), "What this dialog sent before has taken effect. Close it and look at the run.");
      return;
    }
    if (error.status === 422) {
      markAll(error)?.focus();
      return;
    }
    if (error.status === 413) files.refuse(error.message);
    if (error.code === "sensitive_inputs_expired" && secrets.mode === "keep") {
      secrets.set("change");
      secrets.refuse(error.message).focus();
    } else if (error.code === "input_attachments_expired" && files.mode === "keep") {
      files.set("change");
      files.refuse(error.message).focus();
    } else if (error.code === "machine_not_found" || error.code === "pool_not_found") target.refuse(error.message).focus();
    else if (error.code === "session_not_found") fields[4].refuse(error.message).focus();
    fill(trouble, icon("error"), h("span", null, error.message, error.code === "run_not_terminal" ? " Somebody else may have retried it: close this and look." : "", error.requestId && error.status >= 500 ? ` Request ${error.requestId}.` : ""));
    ask(0);
  }

  function countDown(seconds) {
    to("waiting");
    const until = performance.now() + seconds * 1000;
    const draw = () => {
      const left = until - performance.now();
      if (left <= 0) transmit();
      else fill(ticking, `Again in ${span(left + 999)}`);
    };
    say(`Sent again in ${span(seconds * 1000)}.`);
    wait = { timer: setInterval(draw, 200) };
    draw();
  }

  /** No more resending. What may have taken effect can only be sent again as it was. */
  function halt() {
    clearInterval(wait?.timer);
    wait = null;
    fill(ticking);
    if (state === "sending" || unknown) {
      unknown = true;
      life.abort();
      fill(trouble, icon("info"), "Stopped. It may have been retried: close this and look at the run.");
      to("stopped");
      return;
    }
    sent = null;
    fill(trouble);
    to("editing");
    ask(0);
  }

  /** Marks each field that a 422 names. Returns the first control. */
  function markAll(problem) {
    let first = null;
    for (const { loc, msg } of problem.errors) {
      const [place, key, ...rest] = loc;
      const field = place === "body" ? fields.find(({ keys }) => keys.includes(key)) : undefined;
      if (!field) {
        fill(trouble, icon("error"), `${loc.join(" ")}: ${msg}`);
        continue;
      }
      if (field.mode === "keep") field.set("change");
      const control = field.refuseAt ? field.refuseAt(rest, msg, key) : field.refuse(msg);
      first ??= control;
    }
    return first;
  }

  // --- copying --------------------------------------------------------------------------------------------------------

  async function copyAs(language) {
    const wrong = fields.find((field) => field !== secrets && field.check());
    if (wrong) return;
    for (const field of fields) field.clear();
    const body = await build((field) => (field === secrets ? "PUT THE SECRET HERE" : "PUT THE BASE64 OF THE FILE HERE"));
    const url = new URL(`../v1/runs/${run.id}/retry`, location.href.split("#")[0]);
    copy(language === "curl" ? curl(url, body) : python(url, body), language === "curl" ? "curl" : "Python");
  }

  // --- opening and closing --------------------------------------------------------------------------------------------

  function guard() {
    const asks = state === "sending" || state === "reading" || state === "waiting" || (state === "editing" && fields.some((field) => field.dirty()));
    if (!asks || !question.hidden) return true;
    question.hidden = false;
    const leave = h("button", { type: "button", onclick: () => dialog.close() }, state === "editing" ? "Discard" : "Close anyway");
    const stay = h("button", { type: "button", onclick: () => ((question.hidden = true), send.focus()) }, "Stay");
    fill(question, h("span", null, state === "editing" ? "Discard what you have chosen and typed?" : "It was sent: closing does not take it back."), leave, stay);
    stay.focus();
    return false;
  }

  const dialog = openDialog({
    title: ["Retry ", theirs(names.nameOf("workflows", run.workflow_id))],
    className: "retry",
    body: [form, aside],
    foot: [
      trouble,
      question,
      h("div.buttons", null, send, stop, ticking, h("span.grow"), h("button.quiet", { type: "button", onclick: () => copyAs("curl") }, icon("copy"), "curl"), h("button.quiet", { type: "button", onclick: () => copyAs("python") }, icon("copy"), "Python")),
    ],
    guard,
    closed() {
      clearTimeout(timer);
      clearInterval(wait?.timer);
      asking?.abort();
      if (state !== "done") life.abort();
      for (const field of fields) field.wipe();
      sent = null;
      closed();
    },
  });
  dialog.addEventListener("park", () => {
    clearTimeout(timer);
    asking?.abort();
    for (const field of fields) field.wipe();
    if (state === "waiting") interrupted(true);
  });
  dialog.addEventListener("back", () => {
    if (state === "editing") ask(0);
    listMachines();
  });

  function listMachines() {
    Promise.all([names.load("machines", life.signal, true), names.load("pools", life.signal)])
      .then(() => target.redraw())
      .catch((error) => aborted(error) || target.refuse(`The machines cannot be listed: ${error.message}`));
  }

  drawButtons();
  ask(0);
  listMachines();
  const first = form.querySelector(".refused input, fieldset input:checked");
  first?.focus();
  return dialog;
}

/** For a shell. */
function curl(url, body) {
  const quoted = `'${ascii(JSON.stringify(body)).replaceAll("'", `'\\''`)}'`;
  return `curl -sS -X POST ${url} \\\n  -H "Authorization: Bearer $API_KEY" -H 'Content-Type: application/json' \\\n  -d ${quoted}\n`;
}

function python(url, body) {
  return `import os\nimport uuid\n\nimport httpx\n\nreply = httpx.post(\n    "${url}",\n    headers={"Authorization": f"Bearer {os.environ['API_KEY']}", "Idempotency-Key": str(uuid.uuid4())},\n    json=${literal(body)},\n)\nreply.raise_for_status()\nprint(reply.json()["attempt"])\n`;
}

/** JSON as Python writes it, in ASCII without controls. */
function literal(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object" && !JSON.isRawJSON?.(value)) return `{${Object.entries(value).map(([key, item]) => `${quoted(key)}: ${literal(item)}`).join(", ")}}`;
  return quoted(value);
}

/** Python has escapes of its own for what JSON writes as two halves. */
function quoted(value) {
  return ascii(JSON.stringify(value).replace(/[\u{10000}-\u{10ffff}]/gu, (one) => `\\U${one.codePointAt(0).toString(16).padStart(8, "0")}`));
}
