// The retry policy of a workflow: in words, and the dialog that changes it. docs/retry-policies.md has the rules.

import { aborted, call, newIdempotencyKey } from "./api.js";
import { fill, h, icon, openDialog, say, span, theirs, toast } from "./dom.js";

const MOST = { retries: 10, delays: 10, seconds: 86_400, jitter: 50, rules: 20 };
const SHOWN = 6; // waits that the preview names one by one
const UNITS = { s: 1, min: 60, m: 60, h: 3600 };
const ENDINGS = { error: "error", task_failed: "task failed" };

/** The same with plain numbers: a reply's "0.0" is kept as it was written. */
function plain(policy) {
  return JSON.parse(JSON.stringify(policy ?? null));
}

function seconds(number) {
  return number < 120 ? `${number} s` : span(number * 1000);
}

/** "Retries after 10 s, 60 s, 5 min; then stays in error." */
export function preview(given) {
  if (!given) return "Is never retried by itself.";
  const policy = plain(given);
  const waits = Array.from({ length: policy.max_retries }, (_, index) => policy.delays_seconds[Math.min(index, policy.delays_seconds.length - 1)]);
  const named = waits.slice(0, SHOWN).map(seconds).join(", ");
  const more = waits.length > SHOWN ? `, … ${waits.length} times in all` : "";
  const jitter = policy.jitter ? `, each up to ${Math.round(policy.jitter * 100)} % shorter or longer` : "";
  return `Retries after ${named}${more}${jitter}; then stays ${policy.on?.some((rule) => rule.status === "task_failed") ? "as it ended" : "in error"}.`;
}

/** Which endings, a sentence for each rule. */
function rules(policy) {
  if (!policy?.on) return null;
  return h(
    "ol.rules",
    null,
    policy.on.map((rule, index) =>
      h(
        "li",
        null,
        `Rule ${index + 1}: ended in ${ENDINGS[rule.status] ?? rule.status}`,
        rule.error_code ? [" with the code ", h("code", null, theirs(rule.error_code))] : "",
        rule.error_contains ? [rule.error_code ? " and" : " with", " “", theirs(rule.error_contains), "” in a line of its error"] : "",
        ".",
      ),
    ),
  );
}

/** All that a policy says. */
export function policyText(policy) {
  if (!policy) return h("p", null, preview(policy));
  return [
    h("p", null, h("b", null, preview(policy))),
    rules(policy) ?? h("p.faint", null, "Every run that ends in error is retried."),
    policy.avoid_last_machine ? h("p.faint", null, "The machine of the failed attempt is taken last.") : null,
    h("p.faint", null, policy.webhooks === "every" ? "Each ending sends its webhook." : "Only the last ending sends a webhook."),
  ];
}

/** Waits as somebody writes them: "10, 60, 5 min". Null if they cannot be read. */
function readWaits(text) {
  const waits = text
    .split(",")
    .map((part) => /^\s*(\d{1,5})\s*(s|min|m|h)?\s*$/.exec(part))
    .map((found) => found && Number(found[1]) * (UNITS[found[2]] ?? 1));
  return waits.length <= MOST.delays && waits.every((wait) => wait !== null && wait <= MOST.seconds) ? waits : null;
}

/** The dialog; `changed(workflow)` is called with the workflow as it is afterwards. */
export function openPolicy(workflow, changed) {
  const policy = plain(workflow.retry_policy) ?? { max_retries: 3, delays_seconds: [10, 60, 300], jitter: 0, on: null, avoid_last_machine: false, webhooks: "final" };
  const problem = h("p.error", { role: "alert", id: "policy-error" });
  const key = () => newIdempotencyKey();
  const labelled = (label, control, note) => h("div.pair", null, h("label", { htmlFor: control.id }, label), control, note ? h("span.faint", null, note) : null);
  const retries = h("input.number", { type: "number", id: "policy-retries", min: 1, max: MOST.retries, value: policy.max_retries });
  const waits = h("input", { type: "text", id: "policy-waits", value: policy.delays_seconds.map(seconds).join(", "), autocomplete: "off", spellcheck: "false" });
  const jitter = h("input.number", { type: "number", id: "policy-jitter", min: 0, max: MOST.jitter, step: 1, value: Math.round(policy.jitter * 100) });
  const avoids = h("input", { type: "checkbox", checked: policy.avoid_last_machine });
  const every = h("input", { type: "checkbox", checked: policy.webhooks === "every" });
  const list = h("ol.rules");
  const lines = [];
  const adder = h("button.quiet", { type: "button", onclick: () => (add({ status: "error" }).code.focus(), draw()) }, icon("plus"), "Add a rule");

  function add(rule) {
    const status = h("select", { "aria-label": "Ended in" }, Object.entries(ENDINGS).map(([value, label]) => h("option", { value, selected: value === rule.status }, label)));
    const code = h("input", { type: "text", "aria-label": "Code of the error", placeholder: "any code", value: rule.error_code ?? "", autocomplete: "off", spellcheck: "false", maxlength: 100 });
    const contains = h("input", { type: "text", "aria-label": "Text in a line of the error", placeholder: "any text", value: rule.error_contains ?? "", autocomplete: "off", spellcheck: "false", maxlength: 500 });
    const remove = h("button.quiet", { type: "button", "aria-label": "Remove this rule", onclick: () => (lines.splice(lines.indexOf(line), 1), line.node.remove(), adder.focus(), draw()) }, icon("close"));
    const line = { node: h("li.row", null, status, code, contains, remove), status, code, contains };
    lines.push(line);
    list.append(line.node);
    return line;
  }

  for (const rule of policy.on ?? []) add(rule);

  /** The policy as it stands in the fields, or [null, why, where]. */
  function read() {
    if (!retries.value || !retries.validity.valid) return [null, `A number of retries from 1 to ${MOST.retries}.`, retries];
    const delays = readWaits(waits.value);
    if (!delays) return [null, `Waits look like “10 s, 60 s, 5 min”: at most ${MOST.delays}, each at most 24 h.`, waits];
    if (!jitter.value || !jitter.validity.valid) return [null, `A part from 0 to ${MOST.jitter} %.`, jitter];
    return [
      {
        max_retries: Number(retries.value),
        delays_seconds: delays,
        jitter: Number(jitter.value) / 100,
        on: lines.length
          ? lines.map(({ status, code, contains }) => ({ status: status.value, ...(code.value ? { error_code: code.value.trim() } : {}), ...(contains.value ? { error_contains: contains.value } : {}) }))
          : null,
        avoid_last_machine: avoids.checked,
        webhooks: every.checked ? "every" : "final",
      },
    ];
  }

  const shown = h("div.preview", { "aria-live": "polite" });

  function draw() {
    const [wanted, why] = read();
    adder.disabled = lines.length >= MOST.rules;
    fill(shown, wanted ? policyText(wanted) : h("p.bad", null, why));
  }

  const form = h(
    "form.policy",
    { novalidate: true, onsubmit: (event) => (event.preventDefault(), save.click()), oninput: () => (clear(), draw()), onchange: draw },
    labelled("Retries in a row", retries),
    labelled("Waits", waits, "the last one repeats"),
    labelled("Shorter or longer by up to, %", jitter),
    h("div.change", null, h("span", null, "Which endings: the first rule that matches decides. Without a rule, every error."), list, adder),
    h("label.check", null, avoids, "Take the machine of the failed attempt last"),
    h("label.check", null, every, "Send a webhook at each ending, not only at the last"),
  );

  function clear() {
    fill(problem);
    for (const control of form.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
  }

  function refuse(message, control) {
    fill(problem, message);
    control?.setAttribute("aria-invalid", "true");
    control?.setAttribute("aria-describedby", "policy-error");
    control?.focus();
  }

  /** The control that a 422 names. */
  function controlOf(loc) {
    const [name, index, part] = loc.slice(loc.indexOf("retry_policy") + 1);
    if (name === "on") return lines[index]?.[{ status: "status", error_code: "code", error_contains: "contains" }[part] ?? "code"];
    return { max_retries: retries, delays_seconds: waits, jitter }[name];
  }

  async function send(button, wanted, said) {
    if (button.disabled) return;
    button.disabled = true;
    try {
      const { data } = await call("PATCH", `workflows/${workflow.id}`, { body: JSON.stringify({ retry_policy: wanted }), idempotencyKey: key() });
      box.close();
      changed(data);
      toast(said);
    } catch (error) {
      if (!aborted(error)) refuse(error.message, error.errors?.[0] && controlOf(error.errors[0].loc));
    } finally {
      button.disabled = false;
    }
  }

  const save = h("button.primary", { type: "button" }, "Save the policy");
  save.addEventListener("click", () => {
    clear();
    const [wanted, why, where] = read();
    if (wanted) send(save, wanted, "The policy holds for attempts that end from now on");
    else refuse(why, where);
  });
  const remove = workflow.retry_policy ? h("button.danger", { type: "button", onclick: () => send(remove, null, "The workflow has no retry policy any more") }, "Remove the policy") : null;
  const box = openDialog({
    title: ["Retry policy of ", theirs(workflow.name || "this workflow")],
    body: [form, h("h3", null, "What a failed run does"), shown, problem],
    foot: [save, remove, h("button", { type: "button", onclick: () => box.close() }, "Change nothing")],
  });
  draw();
  say("");
  retries.focus();
  return box;
}
