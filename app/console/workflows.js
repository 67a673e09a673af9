// Workflows: found by name, with how their last runs went; and one of them, with its retry policy and its days.

import { call, may, page, poll } from "./api.js";
import { count, fill, h, icon, keeping, notice, now, short, skeleton, theirs, time, took } from "./dom.js";
import { prose } from "./history.js";
import * as names from "./names.js";
import { openPolicy, policyText, preview } from "./policy.js";

const PAGE = 25;
const LAST = 100; // runs that the figures are about
const FIGURES_MS = 60_000;
const ASKED_AT_ONCE = 4;
const DAYS = 14;
const VERSIONS = 20; // earlier ones on the page
const DAY_MS = 86_400_000;

/** #/workflows and #/workflows/<id>. */
export function workflowsView(root, first, app) {
  return first.id ? workflowView(root, first, app) : listView(root, first);
}

// --- figures ----------------------------------------------------------------------------------------------------------

/** Calls `act` with each of these, a few at a time. */
async function each(items, act) {
  const left = [...items];
  const worker = async () => {
    for (let item = left.shift(); item !== undefined; item = left.shift()) await act(item);
  };
  await Promise.all(Array.from({ length: ASKED_AT_ONCE }, worker));
}

/** How the last runs of a workflow ended, and how long the middle one of them took. */
async function figures(workflow, signal) {
  const { data } = await page("runs", { query: { workflow_id: workflow, fields: "status,started_at,ended_at", limit: LAST }, signal });
  const ended = data.items.filter((run) => ["success", "error", "task_failed"].includes(run.status));
  const times = ended.filter((run) => run.started_at && run.ended_at).map((run) => Date.parse(run.ended_at) - Date.parse(run.started_at));
  times.sort((one, other) => one - other);
  return {
    looked: data.items.length,
    ended: ended.length,
    succeeded: ended.filter((run) => run.status === "success").length,
    median: times.length ? times[Math.floor((times.length - 1) / 2)] : null,
    slow: times.length ? times[Math.ceil(0.95 * times.length) - 1] : null,
  };
}

function figureText(known) {
  if (!known) return h("span.faint", null, "…");
  if (!known.ended) return h("span.faint", null, known.looked ? "none of its last runs has ended in success or error" : "no runs");
  const share = Math.round((100 * known.succeeded) / known.ended);
  return [
    h(`span${share < 90 ? ".bad" : ".good"}`, null, `${share} % succeeded`),
    h("span.faint", null, ` of the last ${known.ended}`),
    known.median === null ? null : h("span", null, `half took at most ${took(known.median)}, 95 % at most ${took(known.slow)}`),
  ];
}

// --- the days ---------------------------------------------------------------------------------------------------------

/** Successes and errors of runs that were created on each of the last days, by the reader's calendar. */
function chart(node, filter) {
  const known = new Map(); // beginning of a day -> {success, error}
  const keep = keeping(node);
  fill(node, skeleton(2));

  async function load(signal) {
    const today = new Date(now()).setHours(0, 0, 0, 0);
    const days = Array.from({ length: DAYS }, (_, index) => new Date(today - (DAYS - 1 - index) * DAY_MS + DAY_MS / 2).setHours(0, 0, 0, 0));
    const recent = days.at(-2); // older days seldom change
    await each(days.filter((day) => !known.has(day) || day >= recent), async (day) => {
      const end = new Date(day + 1.5 * DAY_MS).setHours(0, 0, 0, 0) - 1;
      const number = async (status) => {
        const query = { ...filter, status, fields: "id", limit: 1, created_at_from: new Date(day).toISOString(), created_at_to: new Date(end).toISOString() };
        return (await call("GET", "runs", { query, signal })).data.total;
      };
      const [success, error, failed] = await Promise.all(["success", "error", "task_failed"].map(number));
      known.set(day, { success, error: error + failed });
    });
    keep(days.map((day) => [day, known.get(day)]), () => draw(days));
  }

  function draw(days) {
    const most = Math.max(1, ...days.map((day) => known.get(day).success + known.get(day).error));
    const label = (day) => new Date(day).toLocaleDateString(undefined, { day: "numeric", month: "short" });
    const legend = h("p.meta", null, h("span", null, h("i.swatch.succeeded"), "success"), h("span", null, h("i.swatch.failed"), "error"), h("span.faint", null, "by the day on which a run was created"));
    return [h(
      "ol.days",
      { "aria-label": "Successes and errors by day" },
      days.map((day, index) => {
        const { success, error } = known.get(day);
        const words = `${label(day)}: ${success.toLocaleString()} success, ${error.toLocaleString()} error`;
        return h(
          "li",
          { title: words },
          h("span.column", { "aria-hidden": "true" }, h("i.failed", { vars: { "--share": `${(100 * error) / most}%` } }), h("i.succeeded", { vars: { "--share": `${(100 * success) / most}%` } })),
          h("span.unseen", null, words),
          h("span.faint", { "aria-hidden": "true" }, index % 4 === (DAYS - 1) % 4 ? label(day) : ""),
        );
      }),
    ), legend];
  }

  return load;
}

// --- the list ---------------------------------------------------------------------------------------------------------

function listView(root, first) {
  let search = first.params.get("search") ?? "";
  let skip = Number(first.params.get("skip")) || 0;
  let items = null;
  let total = 0;
  const known = new Map(); // workflow -> its figures
  let knownAt = 0;

  const box = h("input", { type: "search", placeholder: "Find by name or id", "aria-label": "Find workflows by name or id", autocomplete: "off", spellcheck: "false", maxlength: 200, value: search });
  box.addEventListener("change", () => go({ search: box.value.trim(), skip: 0 }));
  const days = h("div");
  const loadDays = chart(days, {});
  let daysAt = 0;
  const list = h("div");
  const pager = h("nav.pager", { "aria-label": "Pages" });
  const keep = keeping(list);
  fill(
    root,
    h("h1.unseen", { tabindex: -1 }, "Workflows"),
    h("section", null, h("h2", null, "Runs of all workflows by day"), days),
    h("section", null, h("h2", null, "Workflows"), h("div.filters", { role: "group", "aria-label": "Filters" }, box), list, pager),
  );
  fill(list, skeleton(6));

  function go({ search: text, skip: from }) {
    const params = new URLSearchParams(Object.entries({ search: text, skip: from ? String(from) : "" }).filter(([, value]) => value));
    location.hash = `#/workflows${params.size ? `?${params}` : ""}`;
  }

  async function round(signal) {
    const asked = [search, skip];
    const { data } = await page("workflows", { query: { search, skip, limit: PAGE }, signal });
    if (asked[0] !== search || asked[1] !== skip) return;
    [items, total] = [data.items, data.total];
    for (const item of items) names.learn("workflows", item);
    draw(data.search_is_partial);
    poll.heard();
    if (now() - daysAt > FIGURES_MS) {
      daysAt = now();
      await loadDays(signal).catch((error) => ((daysAt = 0), Promise.reject(error)));
    }
    if (now() - knownAt > FIGURES_MS) {
      await each(items, async ({ id }) => {
        known.set(id, await figures(id, signal));
      });
      knownAt = now();
    }
    draw(data.search_is_partial);
  }

  function draw(isPartial) {
    keep([items, [...known], isPartial], () => [
      items.length ? h("ul.machines", null, items.map(row)) : notice("info", search ? "No workflow has this in its name or id" : "No workflow yet", search ? null : h("p", null, "A program makes one with POST /v1/workflows.")),
      isPartial ? h("p.faint", null, "Only the newest 10,000 workflows were looked at.") : null,
    ]);
    const before = Math.max(0, skip - PAGE);
    fill(
      pager,
      h("span.faint", null, total > items.length ? `${(skip + 1).toLocaleString()} to ${(skip + items.length).toLocaleString()} of ${count(total, "workflow")}` : count(total, "workflow")),
      skip ? h("button", { type: "button", onclick: () => go({ search, skip: before }) }, icon("back"), "Newer") : null,
      skip + items.length < total && items.length ? h("button", { type: "button", onclick: () => go({ search, skip: skip + PAGE }) }, "Older", icon("next")) : null,
    );
  }

  function row(workflow) {
    return h(
      "li",
      null,
      h("div.line", null, h("b", null, h("a", { href: `#/workflows/${workflow.id}` }, theirs(names.nameOf("workflows", workflow.id)))), short(workflow.id), h("span.faint", null, `version ${workflow.version}`), h("span.faint.end", null, "changed ", time(workflow.updated_at))),
      h("p.meta", null, figureText(known.get(workflow.id))),
      workflow.retry_policy ? h("p.meta", null, icon("retry"), preview(workflow.retry_policy)) : null,
    );
  }

  return {
    title: () => "Workflows",
    change({ params }) {
      [search, skip] = [params.get("search") ?? "", Number(params.get("skip")) || 0];
      if (document.activeElement !== box) box.value = search;
      knownAt = 0;
      poll.now(true);
    },
    round,
  };
}

// --- one workflow -----------------------------------------------------------------------------------------------------

function workflowView(root, { id }, app) {
  let workflow = null;
  let known = null;
  let knownAt = 0;

  const heading = h("h1", { tabindex: -1 }, "Workflow ", short(id));
  const about = h("p.meta");
  const runs = h("a.button", { href: `#/runs?workflow=${id}` }, "Its runs");
  const panel = h("div.panel");
  const policy = h("div.policytext");
  const last = h("div");
  const days = h("div");
  const prompt = h("div");
  const versions = h("div");
  let versionsOf = 0; // the version that they came before
  const loadDays = chart(days, { workflow_id: id });
  const back = h("a.back", { href: "#/workflows" }, icon("back"), "Workflows");
  fill(root, back, h("div.runhead", null, h("div.title", null, heading, about), h("div.actions", null, runs)), panel);
  fill(panel, h("section", null, h("h2", null, "Retry policy"), policy), h("section", null, h("h2", null, `Its last ${LAST} runs`), last), h("section", null, h("h2", null, "By day"), days), h("section", null, h("h2", null, "What the agent is told"), prompt), h("section", null, h("h2", null, "Versions"), versions));
  fill(policy, skeleton(2));
  fill(last, skeleton(1));
  fill(prompt, skeleton(2));
  const keepHead = keeping(about);
  const keepPolicy = keeping(policy);
  const keepPrompt = keeping(prompt);
  const keepLast = keeping(last);

  async function round(signal) {
    try {
      take((await call("GET", `workflows/${id}`, { signal })).data);
    } catch (error) {
      if (error.code === "workflow_not_found") fill(root, back, notice("warn", "No workflow with this id", h("p", null, "It was deleted, belongs to another organization, or the address is wrong.")));
      throw error;
    }
    poll.heard();
    if (versionsOf !== workflow.version) {
      const { data } = await call("GET", `workflows/${id}/versions`, { query: { limit: VERSIONS }, signal });
      versionsOf = workflow.version;
      fill(versions, data.length ? h("ol.attempts", null, data.map(version)) : h("p.faint", null, "This is the first one."));
    }
    if (now() - knownAt < FIGURES_MS) return;
    known = await figures(id, signal);
    keepLast(known, () => h("p.meta", null, figureText(known)));
    await loadDays(signal);
    knownAt = now();
  }

  function version(one) {
    return h(
      "li",
      null,
      h("header", null, h("b", null, `Version ${one.version}`), one.name ? theirs(one.name) : null, h("span.faint.end", null, "replaced ", time(one.replaced_at), one.replaced_by_key_id ? [" by key ", short(one.replaced_by_key_id)] : null)),
      h("details.more", null, h("summary", null, "What the agent was told", h("span.unseen", null, ` in version ${one.version}`)), prose(one.main_prompt)),
    );
  }

  function take(data) {
    workflow = data;
    names.learn("workflows", workflow);
    if (
      keepHead([workflow.name, workflow.updated_at, workflow.is_webhooks_enabled], () => {
        fill(heading, theirs(names.nameOf("workflows", workflow.id)));
        return [
          h("span.id", null, id),
          h("span", null, "created ", time(workflow.created_at)),
          h("span", null, "changed ", time(workflow.updated_at)),
          h("span", null, workflow.is_webhooks_enabled ? "its endings are sent to the webhook endpoints" : "sends no webhooks"),
          h("span", null, `version ${workflow.version}`),
        ];
      })
    ) {
      app.titled();
    }
    keepPolicy(workflow.retry_policy, () => [
      policyText(workflow.retry_policy),
      may("resources:write")
        ? h("div.line", null, h("button", { type: "button", onclick: () => openPolicy(workflow, take) }, workflow.retry_policy ? "Change …" : "Retry failed runs by themselves …"))
        : h("p.faint", null, icon("info"), " This key may look, and not change it: it lacks the scope resources:write."),
    ]);
    keepPrompt(workflow.main_prompt, () => prose(workflow.main_prompt));
  }

  return {
    title: () => (workflow ? `Workflow: ${names.nameOf("workflows", id)}` : "Workflow"),
    change: () => poll.now(true),
    round,
    handles: (problem) => problem.code === "workflow_not_found",
  };
}
