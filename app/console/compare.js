// Two attempts of a run side by side: what went wrong, where and how long each ran, who retried it and why, and what stayed of it.

import { aborted, call, page, save } from "./api.js";
import { bytes, fill, h, icon, notice, status, theirs, toast, took } from "./dom.js";
import { json, lastPicture, prose, safely } from "./history.js";
import * as names from "./names.js";
import { called } from "./retry.js";

/** The form that asks for two attempts, and the table below it. The same node for as long as the run is open. */
export function comparison(id, author) {
  let lives = []; // of all attempts, the oldest first
  const [left, right] = ["First attempt", "Second attempt"].map((label) => h("select", { "aria-label": label }));
  const shown = h("div.comparison", { "aria-live": "polite" });
  const button = h("button", { type: "submit" }, "Compare");
  const form = h("form.line", { "aria-label": "Compare two attempts", onsubmit: (event) => (event.preventDefault(), compare()) }, "Compare attempt ", left, " with ", right, button);
  const node = h("section", null, form, shown);

  async function compare() {
    button.disabled = true;
    const chosen = [left, right].map((select) => lives.find((life) => String(life.attempt.attempt) === select.value));
    try {
      fill(shown, table(await Promise.all(chosen.map(details))));
    } catch (error) {
      if (!aborted(error)) fill(shown, notice("warn", "They cannot be compared", h("p", null, error.message)));
    }
    button.disabled = false;
  }

  /** What an attempt produced; null for a key that may see only the current one. */
  async function details(life) {
    const number = life.attempt.attempt;
    try {
      const { data: attempt } = await call("GET", `runs/${id}/attempts/${number}`);
      const files = attempt.output_attachment_ids.length ? (await page("run-attachments", { query: { run_id: id, attempt: number, limit: 1000 } })).data.items : [];
      return { ...life, attempt, files, produced: true };
    } catch (error) {
      if (error.status !== 404) throw error;
      return { ...life, files: [], produced: false };
    }
  }

  function table(both) {
    const row = (label, cell) => {
      const cells = both.map((one) => h("td", null, safely(() => cell(one) ?? h("span.faint", null, "–"), one.attempt)));
      const [before, after] = cells.map((one) => one.textContent);
      return h(`tr${before === after ? "" : ".differs"}`, null, h("th", { scope: "row" }, label), cells);
    };
    return h(
      "table",
      null,
      h("caption.unseen", null, "Two attempts side by side"),
      h("thead", null, h("tr", null, h("td"), both.map(({ attempt }) => h("th", { scope: "col" }, `Attempt ${attempt.attempt}`)))),
      h(
        "tbody",
        null,
        row("Status", ({ attempt }) => status(attempt.status)),
        row("What went wrong", ({ attempt }) => wrong(attempt)),
        row("Machine", ({ attempt }) => (attempt.machine_id ? names.named("machines", attempt.machine_id) : null)),
        row("Waited", ({ waited }) => took(waited)),
        row("Ran", ({ attempt, ran }) => (attempt.started_at ? took(ran) : null)),
        row("Begun by", ({ cause }) => (cause ? ["a retry by ", author(cause.retried_by_key_id, cause.retried_by_user_id, cause.by, cause.retried_by_key_name), cause.reason ? [": “", theirs(cause.reason), "”"] : null] : "the run's creation")),
        row("Changed fields", ({ cause }) => (cause?.overridden.length ? cause.overridden.map((name) => h("span.tag", { title: name }, called(name))) : null)),
        row("Workflow version", ({ attempt }) => attempt.workflow_version?.toLocaleString()),
        row("Used", ({ attempt }) => (attempt.usage_metadata ? json(attempt.usage_metadata, "What the attempt used") : null)),
        row("Result", (one) => kept(one) ?? (one.attempt.output_data === null ? null : json(one.attempt.output_data, "Result"))),
        row("Last picture", (one) => kept(one) ?? (one.attempt.run_message_history && lastPicture(one.attempt.run_message_history))),
        row("Files", (one) => kept(one) ?? (one.files.length ? h("ul.files", null, one.files.map(file)) : null)),
      ),
    );
  }

  function wrong(attempt) {
    const lines = attempt.error ?? [];
    if (!lines.length && !attempt.error_code) return null;
    return [attempt.error_code ? h("p", null, h("code.tag", null, attempt.error_code)) : null, lines.slice(0, 20).map((line) => prose(line)), lines.length > 20 ? h("p.faint", null, `and ${lines.length - 20} more`) : null];
  }

  /** Why nothing that it produced can be shown. */
  function kept({ attempt, produced }) {
    if (!produced) return h("span.faint", null, "This key sees only what the current attempt produced.");
    return attempt.outputs_are_kept ? null : h("span.faint", null, "Cleared by the retry: ATTEMPT_OUTPUTS was none.");
  }

  function file(one) {
    const download = async (event) => {
      const { currentTarget } = event;
      currentTarget.disabled = true;
      await save(one).catch((error) => aborted(error) || toast(error.message, "bad"));
      currentTarget.disabled = false;
    };
    return h("li", null, icon("file"), h("span.grow", null, theirs(one.filename)), h("span.faint", null, bytes(one.size_bytes)), h("button.quiet", { type: "button", onclick: download }, "Download", h("span.unseen", null, " ", one.filename)));
  }

  /** The node, or null while there is one attempt only. What is chosen stays chosen. */
  return (all) => {
    lives = all;
    if (lives.length < 2) return null;
    const numbers = lives.map((life) => life.attempt.attempt);
    for (const [select, preferred] of [[left, numbers.at(-2)], [right, numbers.at(-1)]]) {
      if (select.options.length === numbers.length) continue;
      const chosen = numbers.includes(Number(select.value)) ? Number(select.value) : preferred;
      fill(select, numbers.map((number) => h("option", { value: number, selected: number === chosen }, `${number}`)));
    }
    return node;
  };
}
