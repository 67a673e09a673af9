// Runs that start later: one that is held until a time, and one that its workflow's policy will retry.

import { aborted, call, newIdempotencyKey } from "./api.js";
import { fill, h, icon, minute, notice, now, openDialog, time, timestamp, toast } from "./dom.js";
import { momentInput, momentOf, targetField } from "./fields.js";
import * as names from "./names.js";

const HOUR_MS = 3_600_000;

/** "14:00, in 2 h", which stays true while it is on the screen. */
export function moment(at) {
  return [timestamp(at, minute), ", ", time(at, "when")];
}

/** "attempt 2 of 3": the next one, and the last one that the policy allows. */
export function attemptOf(run) {
  return `attempt ${run.attempt + 1} of ${run.attempt + Math.max(1, run.retries_left ?? 1)}`;
}

/** A button that sends a request when it is pressed; `key` stays the same for what must not happen twice. */
function actor(label, drawing, send, said, changed, kind = "button") {
  const key = newIdempotencyKey();
  const button = h(kind, { type: "button" }, icon(drawing), label);
  button.addEventListener("click", async () => {
    if (button.disabled) return;
    button.disabled = true;
    try {
      changed(await send(key));
      toast(said);
    } catch (error) {
      if (!aborted(error)) toast(error.message, "bad");
    } finally {
      button.disabled = false;
    }
  });
  return button;
}

function patch(run, body, idempotencyKey) {
  return call("PATCH", `runs/${run.id}`, { body: JSON.stringify(body), idempotencyKey });
}

/** For a run that is held: when it starts, and, with `acts`, moving it and starting it now. */
export function heldNotice(run, { where, acts, changed }) {
  return notice(
    "info",
    ["Starts at ", moment(run.not_before)],
    h("p", null, "It is held until then and waits in no queue. ", where),
    acts
      ? h(
          "div.line",
          null,
          h("button", { type: "button", onclick: () => openMove(run, changed) }, "Move …"),
          actor("Start now", "play", (key) => patch(run, { not_before: null }, key), "It takes its place in the queue", changed, "button.primary"),
        )
      : null,
  );
}

/** Another time for a run that has no machine yet. */
export function openMove(run, changed) {
  const at = momentInput("Start not before", run.not_before ?? now() + HOUR_MS);
  const why = h("input", { type: "text", maxlength: 500, id: "move-reason", autocomplete: "off" });
  const problem = h("p.error", { role: "alert" });
  const key = newIdempotencyKey();
  const act = h("button.primary", { type: "button" }, run.not_before ? "Move" : "Start later");
  const box = openDialog({
    title: run.not_before ? "Move the start" : "Start this run later",
    className: "small",
    body: [h("p", null, "The run is held until this time, and then takes its place in the queue."), at, h("label", { htmlFor: "move-reason" }, "Reason (optional, others see it)"), why, problem],
    foot: [act, h("button", { type: "button", onclick: () => box.close() }, "Change nothing")],
  });
  act.addEventListener("click", async () => {
    const [wanted, wrong] = momentOf(at);
    fill(problem, wrong);
    if (wrong) {
      at.setAttribute("aria-invalid", "true");
      at.focus();
      return;
    }
    act.disabled = true;
    try {
      const reply = await patch(run, { not_before: wanted, ...(why.value.trim() ? { reason: why.value.trim() } : {}) }, key);
      box.close();
      changed(reply);
      toast(`The run starts at ${minute(wanted)}`);
    } catch (error) {
      act.disabled = false;
      if (!aborted(error)) fill(problem, error.message);
    }
  });
}

/** For a run that its workflow's policy will retry; `because` is the reason of the event that planned it. */
export function plannedNotice(run, { because, policy, acts, changed }) {
  const [, rule] = /^Rule (\d+) /.exec(because ?? "") ?? [];
  return notice(
    "retry",
    ["Will be retried at ", moment(run.next_retry_at), ": ", attemptOf(run)],
    h("p", null, rule ? `Because rule ${rule} of its workflow's ` : "Because of its workflow's ", policy, rule ? " matched." : ".", " What its last attempt left stands below until then."),
    acts
      ? h(
          "div.line",
          null,
          actor("Drop it", "close", (key) => patch(run, { next_retry_at: null }, key), "The policy will not retry this attempt", changed),
          actor("Retry now", "retry", (key) => call("POST", `runs/${run.id}/retry`, { body: JSON.stringify({ expected_attempt: run.attempt }), idempotencyKey: key }), `Attempt ${run.attempt + 1} is queued`, changed, "button.primary"),
        )
      : null,
  );
}

/** For a run that has no machine yet: any machine may take it. */
export function anyMachine(run, changed) {
  return actor("Any machine", "machine", (key) => patch(run, { pool_ids: [] }, key), "Any machine may take it", changed);
}

/** Another machine, or other pools, for a run that has no machine yet; it keeps its place in the queue. */
export function openTarget(run, changed) {
  const field = targetField({ ...run, status: "scheduling", assigned_machine_id: null }, () => field.clear());
  const problem = h("p.error", { role: "alert" });
  const key = newIdempotencyKey();
  const act = h("button.primary", { type: "button" }, "Send it there");
  const box = openDialog({
    title: "Where this run waits",
    body: [h("p", null, "It keeps its place in the queue. Its secrets and files stay as they are."), field.node, problem],
    foot: [act, h("button", { type: "button", onclick: () => box.close() }, "Change nothing")],
  });
  field.set("change");
  Promise.all([names.load("machines"), names.load("pools")]).then(() => field.redraw(), () => {});
  act.addEventListener("click", async () => {
    fill(problem);
    const wrong = field.check();
    const body = {};
    field.put(body);
    if (wrong || !Object.keys(body).length) {
      wrong?.focus();
      if (!wrong) fill(problem, "Choose a machine, pools, or any.");
      return;
    }
    act.disabled = true;
    try {
      const reply = await patch(run, body, key);
      box.close();
      changed(reply);
      toast("The run waits there");
    } catch (error) {
      act.disabled = false;
      if (!aborted(error)) fill(problem, error.message);
    }
  });
}
