// Bulk retries: the dialog that starts one, their list, and the page of one with its runs.

import { aborted, call, may, me, newIdempotencyKey, poll } from "./api.js";
import { bar, count, fill, h, icon, keeping, notice, openDialog, reason, short, skeleton, status, theirs, time, timestamp, toast } from "./dom.js";
import { priorityField, reasonField, startField, targetField, valuesField } from "./fields.js";
import * as names from "./names.js";

const QUIET_MS = 300; // after the last change
const PAGE = 100;
const STATES = { running: "running", paused: "scheduling", completed: "success", aborted: "cancelled", failed: "error" };
const PAUSED = { requested: "paused by a caller", first_failed: "one of the first did not succeed", stop_after_failures: "too many failed again" };
const WAITING = { first: "waits until the first have ended", quota: "waits: the organization has as many waiting runs as it may" };
const REFUSED = {
  run_not_terminal: ["is still active", "are still active"],
  run_not_found: ["does not exist", "do not exist"],
  sensitive_inputs_expired: ["lacks its secrets: they have expired", "lack their secrets: they have expired"],
  input_attachments_expired: ["has an expired input file", "have expired input files"],
  retry_too_soon: ["ended too recently", "ended too recently"],
  attempt_changed: ["was retried meanwhile", "were retried meanwhile"],
  machine_deleted: ["is pinned to a machine that was deleted", "are pinned to machines that were deleted"],
  pool_deleted: ["wants a pool that was deleted", "want pools that were deleted"],
};

function refused(code, number) {
  const words = REFUSED[code];
  return words ? `${number.toLocaleString()} ${words[number === 1 ? 0 : 1]}` : `${number.toLocaleString()}: ${code.replaceAll("_", " ")}`;
}

// --- the dialog -------------------------------------------------------------------------------------------------------

function numberField(legend, label, note, name, attributes) {
  const error = h("p.error", { role: "alert" });
  const input = h("input.number", { type: "number", "aria-label": label, ...attributes });
  const node = h("fieldset.field", null, h("legend", null, legend), h("div.line", null, input, h("span.faint", null, note)), error);
  return {
    node,
    keys: [name],
    check: () => (input.validity.valid ? null : own.refuse(`A number from ${attributes.min} to ${attributes.max}, or nothing.`)),
    clear: () => (fill(error), input.removeAttribute("aria-invalid")),
    refuse: (message) => (fill(error, message), input.setAttribute("aria-invalid", "true"), input),
    put(job) {
      if (input.value) job[name] = Number(input.value);
    },
  };
}

/** `chosen` is `{run_ids}` or `{filter}`, `total` how many runs that is about. */
export function openBulkRetry({ chosen, total, closed }) {
  const idempotencyKey = newIdempotencyKey();
  const nothing = { input_values: null, pool_ids: null, machine_id: null };
  const overrides = [valuesField(nothing, changed, "Each run keeps its own."), targetField(nothing, changed), priorityField(nothing, changed, "Each run keeps its own."), startField(changed)];
  const [, target] = overrides;
  const pace = [
    numberField("First", "Retry so many first", "go first, the rest only if all of them succeed", "first", { min: 0, max: 10_000 }),
    numberField("Pause", "Pause after so many failures", "failures pause it", "stop_after_failures", { min: 0, max: 10_000 }),
    numberField("Pace", "Retries a second at most", "retries a second at most", "pace_per_second", { min: 0.1, max: 1000, step: "any" }),
  ];
  const fields = [...overrides, ...pace, reasonField()];
  const form = h("form.fields", { novalidate: true, autocomplete: "off", onsubmit: (event) => (event.preventDefault(), press()), oninput: changed }, fields.map((field) => field.node));
  const verdict = h("div.verdict", { "aria-live": "polite" });
  const outcome = h("div.outcome", null, skeleton(3));
  const aside = h("aside", { "aria-label": "What will happen" }, h("h3", null, "What will happen"), verdict, outcome);
  const trouble = h("div.trouble", { role: "alert" });
  const send = h("button.primary", { type: "button", onclick: press }, icon("retry"), "Retry");
  let asking = null;
  let timer = 0;

  function build() {
    const body = { ...chosen };
    const changes = {};
    for (const field of overrides) field.put(changes);
    if (Object.keys(changes).length) body.overrides = changes;
    for (const field of fields.slice(overrides.length)) field.put(body);
    return JSON.stringify(body);
  }

  function changed() {
    for (const field of fields) field.clear();
    fill(trouble);
    aside.classList.add("stale");
    clearTimeout(timer);
    timer = setTimeout(foretell, QUIET_MS);
  }

  async function foretell() {
    asking?.abort();
    const abort = (asking = new AbortController());
    try {
      const { data } = await call("POST", "bulk-retries", { query: { dry_run: true }, body: build(), signal: abort.signal });
      if (asking !== abort) return;
      draw(data);
    } catch (error) {
      if (aborted(error) || asking !== abort) return;
      aside.classList.remove("stale");
      fill(verdict, h("p.bad", null, icon("warn"), error instanceof SyntaxError ? "Something is not finished yet." : error.message));
    }
  }

  function draw(answer) {
    aside.classList.remove("stale");
    const none = answer.would_retry === 0;
    fill(verdict, h(`p.${none ? "bad" : "good"}`, null, icon(none ? "error" : "success"), `${answer.would_retry.toLocaleString()} of ${count(answer.total, "run")} can be retried`));
    fill(
      outcome,
      h("ul.refusals", null, Object.entries(answer.refusals).map(([code, number]) => h("li", null, refused(code, number), samples(answer.sample, code)))),
      h("ul", null, Object.entries(answer.will_wait).map(([code, number]) => h("li", null, `${number.toLocaleString()} will wait: ${reason(code).toLowerCase()}`))),
      h("p.faint", null, "Each keeps its id, its files and its secrets; what its last attempt left is cleared."),
    );
    if (none) send.setAttribute("aria-disabled", "true");
    else send.removeAttribute("aria-disabled");
    fill(send, icon("retry"), `Retry ${count(answer.would_retry, "run")}`);
  }

  function samples(sample, code) {
    const found = sample.filter((one) => one.code === code).slice(0, 5);
    return h("div.faint", null, found.map((one, index) => [index ? ", " : "", h("a", { href: `#/runs/${one.run_id}`, target: "_blank" }, short(one.run_id))]));
  }

  async function press() {
    if (send.disabled || send.getAttribute("aria-disabled") === "true") return;
    for (const field of fields) {
      const wrong = field.check();
      if (wrong) {
        wrong.focus();
        return;
      }
    }
    send.disabled = true;
    fill(trouble);
    try {
      const { data } = await call("POST", "bulk-retries", { body: build(), idempotencyKey });
      box.close();
      location.hash = `#/bulk/${data.id}`;
    } catch (error) {
      if (aborted(error)) return;
      const [refusal] = error.errors ?? [];
      const field = refusal && fields.find(({ keys }) => keys.some((key) => refusal.loc.includes(key)));
      if (field) field.refuse(refusal.msg).focus();
      else fill(trouble, h("p.bad", null, icon("warn"), error.message));
    } finally {
      send.disabled = false;
    }
  }

  const box = openDialog({
    title: `Retry ${count(total, "run")}`,
    className: "retry",
    body: [form, aside],
    foot: [trouble, send, h("button", { type: "button", onclick: () => box.close() }, "Leave them")],
    closed: () => {
      clearTimeout(timer);
      asking?.abort();
      closed?.();
    },
  });
  const begin = () => {
    Promise.all([names.load("machines"), names.load("pools")]).then(() => target.redraw(), () => {});
    foretell();
  };
  box.addEventListener("back", begin);
  begin();
}

// --- the screens ------------------------------------------------------------------------------------------------------

/** #/bulk and #/bulk/<id>. */
export function bulkView(root, first) {
  return first.id ? jobView(root, first) : jobsView(root);
}

/** How far it is, in words. */
function standing(job) {
  return [
    h("span", null, `${job.retried.toLocaleString()} of ${count(job.total, "run")} retried`),
    job.skipped ? h("span", null, `${job.skipped.toLocaleString()} skipped`) : null,
    h("span.good", null, `${job.succeeded.toLocaleString()} succeeded`),
    job.failed ? h("span.bad", null, `${job.failed.toLocaleString()} failed again`) : null,
    job.cancelled ? h("span", null, `${job.cancelled.toLocaleString()} cancelled`) : null,
  ];
}

function jobsView(root) {
  const list = h("div");
  const keep = keeping(list);
  fill(root, h("h1.unseen", { tabindex: -1 }, "Bulk retries"), h("section", null, h("h2", null, "Bulk retries"), list));
  fill(list, skeleton(4));
  return {
    title: () => "Bulk retries",
    change: () => poll.now(true),
    async round(signal) {
      const { data } = await call("GET", "bulk-retries", { signal });
      keep(data.items, () => (data.items.length ? h("ul.machines", null, data.items.map(row)) : notice("info", "No bulk retry yet", h("p", null, "Choose runs in the list of runs, and retry them together."))));
    },
  };

  function row(job) {
    return h(
      "li",
      null,
      h("div.line", null, status(job.state, STATES[job.state]), h("b", null, h("a", { href: `#/bulk/${job.id}` }, count(job.total, "run"), " ", short(job.id))), job.reason ? h("span", null, "“", theirs(job.reason), "”") : null, h("span.end", null, time(job.created_at))),
      h("p.meta", null, standing(job)),
    );
  }
}

function jobView(root, { id, params }) {
  const path = `bulk-retries/${id}`;
  const OUTCOMES = ["", "pending", "retried", "skipped"];
  let wanted = read(params);
  let limit = PAGE;
  let job = null;
  const heading = h("h1", { tabindex: -1 }, "Bulk retry ", short(id));
  const about = h("p.meta");
  const actions = h("div.actions");
  const progress = h("div.life");
  const chips = h("nav.chips", { "aria-label": "Outcome" }, OUTCOMES.map((name) => h("a.chip", { href: `#/bulk/${id}${name ? `?outcome=${name}` : ""}`, "data-outcome": name }, name || "All", h("b"))));
  const list = h("div");
  const more = h("button", { type: "button", hidden: true, onclick: () => ((limit = Math.min(1000, limit * 4)), poll.now(true)) }, "Show more");
  fill(root, h("a.back", { href: "#/bulk" }, icon("back"), "Bulk retries"), h("div.runhead", null, h("div.title", null, heading, about), actions), h("div.panel", null, progress, chips, list, more));
  fill(list, skeleton(4));
  mark();
  const keepHead = keeping(about);
  const keepActions = keeping(actions);
  const keepProgress = keeping(progress);
  const keepList = keeping(list);

  function read(query) {
    return OUTCOMES.includes(query.get("outcome")) ? query.get("outcome") : "";
  }

  function mark() {
    for (const chip of chips.children) {
      if (chip.dataset.outcome === wanted) chip.setAttribute("aria-current", "true");
      else chip.removeAttribute("aria-current");
    }
  }

  async function round(signal) {
    const asked = wanted;
    try {
      const [{ data: found }, { data }] = await Promise.all([call("GET", path, { signal }), call("GET", `${path}/items`, { query: { outcome: asked, limit }, signal })]);
      if (asked !== wanted) return;
      job = found;
      keepHead(job, drawHead);
      keepActions([job.state], buttons);
      keepProgress(job, () => [bar(job.total ? (job.retried + job.skipped) / job.total : 1, "ran"), h("span", null, `${(job.retried + job.skipped).toLocaleString()} of ${job.total.toLocaleString()}`)]);
      for (const chip of chips.children) fill(chip.querySelector("b"), (chip.dataset.outcome ? job[chip.dataset.outcome] : job.total).toLocaleString());
      more.hidden = data.items.length >= data.total || limit >= 1000;
      keepList(data.items, () => (data.items.length ? h("ol.attempts", null, data.items.map(item)) : notice("info", asked ? `No run is ${asked}` : "No run was chosen")));
    } catch (error) {
      if (error.code === "bulk_retry_not_found") {
        fill(root, h("a.back", { href: "#/bulk" }, icon("back"), "Bulk retries"), notice("warn", "No bulk retry with this id", h("p", null, "It ended long ago, belongs to another organization, or the address is wrong.")));
      }
      throw error;
    }
  }

  function drawHead() {
    const why = job.pause_reason ? PAUSED[job.pause_reason] : job.waiting_for ? WAITING[job.waiting_for] : job.failure ? "its API key was revoked or has expired" : "";
    return [
      h("span", null, status(job.state, STATES[job.state])),
      why ? h("span.bad", null, why) : null,
      ...standing(job),
      job.reason ? h("span", null, "“", theirs(job.reason), "”") : null,
      h("span.faint", null, "begun ", time(job.created_at)),
      h("span.faint", null, "by ", job.by.key_id === me.key_id ? "you (this key)" : short(job.by.key_id)),
      h("span.id", null, id),
    ];
  }

  function buttons() {
    if (!may("runs:write")) return h("p.obstacle", null, icon("info"), h("span", null, "This key may look, and not act: it lacks the scope runs:write."));
    if (!["running", "paused"].includes(job.state)) return [];
    const [wish, label, drawing] = job.state === "running" ? ["pause", "Pause", "pause"] : ["resume", "Resume", "play"];
    const change = h("button", { type: "button", onclick: () => order(change, wish) }, icon(drawing), label);
    const stop = h("button", { type: "button", onclick: () => order(stop, "abort") }, icon("close"), "Abort");
    return [change, stop];
  }

  async function order(button, wish) {
    button.disabled = true;
    try {
      await call("POST", `${path}/${wish}`, { idempotencyKey: newIdempotencyKey() });
      poll.now(true);
    } catch (error) {
      if (!aborted(error)) toast(error.message, "bad");
    } finally {
      button.disabled = false;
    }
  }

  function item(one) {
    const shown = one.outcome === "retried" ? (one.result ?? "deleted") : one.outcome;
    return h(
      "li",
      null,
      h("header", null, status(shown, one.outcome === "retried" ? (one.result ?? "cancelled") : one.outcome === "pending" ? "scheduling" : "cancelled"), h("span.grow", null, h("a", { href: `#/runs/${one.run_id}` }, "Run ", short(one.run_id)), one.attempt && one.outcome === "retried" ? ` attempt ${one.attempt + 1}` : "")),
      h("p.meta", null, one.detail ? h("span", null, one.detail) : null, one.decided_at ? h("span.faint", null, timestamp(one.decided_at)) : null),
    );
  }

  return {
    title: () => (job ? `Bulk retry of ${count(job.total, "run")}` : "Bulk retry"),
    change(to) {
      wanted = read(to.params);
      limit = PAGE;
      mark();
      poll.now(true);
    },
    round,
    handles: (problem) => problem.code === "bulk_retry_not_found",
  };
}
