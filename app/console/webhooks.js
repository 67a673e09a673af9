// Webhooks: where endings are sent to, what became of each message, and sending again. No secret is shown here, nor asked for.

import { aborted, call, may, newIdempotencyKey, poll } from "./api.js";
import { copyButton, count, entryOf, fill, h, icon, keeping, local, notice, now, openDialog, short, skeleton, status, theirs, time, timestamp, toast, took } from "./dom.js";

const PAGE = 50;
const STATES = { pending: "scheduling", delivered: "success", failed: "error" };
const WHY = {
  timeout: "No answer within 15 s",
  connection_failed: "No connection",
  tls_failed: "Its certificate is not valid",
  no_answer: "What came back was no answer",
  address_not_allowed: "Its address may not be used, or it has none",
  internal_error: "The service failed because of a defect",
  endpoint_disabled: "Not sent: the endpoint was disabled",
  run_deleted: "Not sent: the run was deleted",
};
const DISABLED = { requested: "disabled", gone: "disabled: it answered 410", failing: "disabled: it failed for five days" };

export function mayManage() {
  return may("webhooks:write");
}

/** The organization's endpoints, by id. */
export async function loadEndpoints(signal) {
  const { data } = await call("GET", "webhook-endpoints", { signal });
  return new Map(data.items.map((endpoint) => [endpoint.id, endpoint]));
}

function state(endpoint) {
  if (endpoint.disabled) return h("span.bad", null, entryOf(DISABLED, endpoint.disabled_reason), ", ", time(endpoint.disabled_at));
  if (endpoint.is_recovering) return "sends what it has missed";
  return endpoint.failing_since ? h("span.bad", null, "failing for ", time(endpoint.failing_since, "since")) : h("span.good", null, "enabled");
}

function answer(one) {
  if (one.error) return `${entryOf(WHY, one.error) ?? one.error.replaceAll("_", " ")}.`;
  return one.response_status ? [h(one.response_status < 300 ? "b" : "b.bad", null, String(one.response_status)), ` after ${one.duration_ms < 1000 ? `${one.duration_ms} ms` : took(one.duration_ms)}`] : "Not sent yet.";
}

async function act(button, path, said, method = "POST", body = undefined) {
  button.disabled = true;
  try {
    await call(method, path, { body: body && JSON.stringify(body), idempotencyKey: newIdempotencyKey() });
    toast(said);
    poll.now(true);
    return null;
  } catch (error) {
    return error;
  } finally {
    button.disabled = false;
  }
}

async function actOrSay(button, ...rest) {
  const error = await act(button, ...rest);
  if (error && !aborted(error)) toast(error.message, "bad");
}

// --- deliveries -------------------------------------------------------------------------------------------------------

/** Draws deliveries into a node; `about(one)` is what stands first, `sends(one)` whether it can be sent again. */
export function deliveryList(node, about, sends) {
  const opened = new Map(); // id -> its last tries
  const keep = keeping(node);

  function tries(list) {
    return list.map((one) =>
      h("li", null, timestamp(one.tried_at), h("div", null, answer(one), one.response_body ? h("pre.code", { tabindex: 0, role: "group", "aria-label": "What it answered" }, theirs(one.response_body)) : null)),
    );
  }

  async function show(id, list) {
    fill(list, tries(opened.get(id) ?? []));
    try {
      opened.set(id, (await call("GET", `webhook-deliveries/${id}`)).data.last_tries);
      fill(list, tries(opened.get(id)));
    } catch (error) {
      if (!aborted(error)) fill(list, h("li.error", null, error.message));
    }
  }

  function row(one) {
    const list = h("ol.events");
    const details = h(
      "details.more",
      { open: opened.has(one.id), ontoggle: () => (details.open ? show(one.id, list) : opened.delete(one.id)) },
      h("summary", null, "Answers", h("span.unseen", null, ` to message ${one.id.slice(0, 8)}`)),
      list,
    );
    const again = h("button", { type: "button", onclick: () => actOrSay(again, `webhook-deliveries/${one.id}/resend`, "It is sent again") }, icon("retry"), "Send again", h("span.unseen", null, ` message ${one.id.slice(0, 8)}`));
    return h(
      "li",
      null,
      h("header", null, status(one.status, entryOf(STATES, one.status)), h("span.grow", null, about(one)), mayManage() && sends(one) ? again : null),
      h(
        "p.meta",
        null,
        h("span", null, answer(one)),
        h("span", null, count(one.tries, "try", "tries")),
        one.next_try_at ? h("span", null, "next try ", time(one.next_try_at, "when")) : null,
        h("span.faint", null, "ended ", time(one.occurred_at)),
        h("span.faint", null, "message ", short(one.id)),
      ),
      one.tried_at ? details : null,
    );
  }

  return (items, shown) => keep([items, shown], () => (items.length ? h("ol.attempts", null, items.map(row)) : shown.empty));
}

// --- the screens ------------------------------------------------------------------------------------------------------

/** #/webhooks and #/webhooks/<endpoint>. */
export function webhooksView(root, first) {
  return first.id ? endpointView(root, first) : endpointsView(root);
}

function endpointsView(root) {
  const list = h("div");
  const keep = keeping(list);
  fill(root, h("h1.unseen", { tabindex: -1 }, "Webhooks"), h("section", null, h("h2", null, "Endpoints"), mayManage() ? h("div.line", null, h("button", { type: "button", onclick: () => openEndpoint(null, (made) => (location.hash = `#/webhooks/${made.id}`)) }, icon("plus"), "New endpoint …")) : null, list));
  fill(list, skeleton(4));

  return {
    title: () => "Webhooks",
    change: () => poll.now(true),
    async round(signal) {
      const all = [...(await loadEndpoints(signal)).values()];
      keep(all, () => (all.length ? h("ul.machines", null, all.map(row)) : nothing()));
    },
  };

  function row(one) {
    return h(
      `li${one.disabled ? ".off" : ""}`,
      null,
      h("div.line", null, icon("next"), h("b", null, h("a", { href: `#/webhooks/${one.id}` }, theirs(one.url))), h("span.end", null, state(one))),
      one.description ? h("p.meta", null, theirs(one.description)) : null,
    );
  }
}

/** The form of an endpoint: a new one, or this one. `done(endpoint)` gets it as it is afterwards. */
function openEndpoint(endpoint, done) {
  const url = h("input", { type: "url", id: "endpoint-url", value: endpoint?.url ?? "", placeholder: "https://example.com/hooks/runs", maxlength: 2048, autocomplete: "off", spellcheck: "false", "aria-describedby": "endpoint-error" });
  const description = h("input", { type: "text", id: "endpoint-description", value: endpoint?.description ?? "", maxlength: 255, autocomplete: "off" });
  const problem = h("p.error", { role: "alert", id: "endpoint-error" });
  let [key, sent] = ["", ""]; // the same body is sent under the same key
  const save = h("button.primary", { type: "button" }, endpoint ? "Save" : "Make the endpoint");
  const dialog = openDialog({
    title: endpoint ? "Change the endpoint" : "New endpoint",
    className: "small",
    body: h(
      "form.policy",
      { novalidate: true, onsubmit: (event) => (event.preventDefault(), save.click()) },
      h("label", { htmlFor: url.id }, "URL: https, and a public host"),
      url,
      h("label", { htmlFor: description.id }, "Description (optional)"),
      description,
      problem,
      endpoint ? null : h("p.faint", null, "It gets a signed message whenever a run ends whose workflow has is_webhooks_enabled. Its page says how to read the secret for the signature."),
    ),
    foot: [save, h("button", { type: "button", onclick: () => dialog.close() }, "Change nothing")],
  });
  save.addEventListener("click", async () => {
    if (save.disabled) return;
    fill(problem);
    for (const control of [url, description]) control.removeAttribute("aria-invalid");
    save.disabled = true;
    try {
      const body = JSON.stringify({ url: url.value.trim(), description: description.value.trim() || null });
      if (body !== sent) [key, sent] = [newIdempotencyKey(), body];
      const { data } = await call(endpoint ? "PATCH" : "POST", endpoint ? `webhook-endpoints/${endpoint.id}` : "webhook-endpoints", { body, idempotencyKey: key });
      dialog.close();
      done(data);
      toast(endpoint ? "It is changed" : "The endpoint is made");
    } catch (error) {
      if (aborted(error)) return;
      const control = error.errors?.[0]?.loc.includes("description") ? description : url;
      fill(problem, error.message);
      control.setAttribute("aria-invalid", "true");
      control.focus();
    } finally {
      save.disabled = false;
    }
  });
  url.focus();
}

/** How the first one is made. */
function nothing() {
  const url = new URL("../v1/webhook-endpoints", location.href.split("#")[0]);
  const curl = `curl -sS -X POST ${url} \\\n  -H "Authorization: Bearer $API_KEY" -H 'Content-Type: application/json' \\\n  -d '{"url": "https://..."}'`;
  return notice(
    "info",
    "No endpoint yet",
    h("p", null, "When a run ends whose workflow has is_webhooks_enabled, every endpoint gets a signed message."),
    mayManage() ? h("div.snippet", null, h("pre.code", { tabindex: 0, role: "group", "aria-label": "curl" }, curl), copyButton(() => curl, "curl")) : h("p", null, "This key may not make one (it lacks the scope webhooks:write)."),
  );
}

function endpointView(root, { id, params }) {
  const path = `webhook-endpoints/${id}`;
  let wanted = read(params);
  let limit = PAGE;
  let endpoint = null;

  const heading = h("h1", { tabindex: -1 }, "Endpoint ", short(id));
  const about = h("p.meta");
  const actions = h("div.actions");
  const chips = h("nav.chips", { "aria-label": "State" }, ["", ...Object.keys(STATES)].map((name) => h("a.chip", { href: `#/webhooks/${id}${name ? `?status=${name}` : ""}`, "data-state": name }, name ? status(name, STATES[name]) : "All")));
  const summary = h("p.faint");
  const list = h("div");
  const secret = h("div");
  const more = h("button", { type: "button", hidden: true, onclick: () => ((limit += 4 * PAGE), poll.now(true)) }, "Show more");
  fill(root, h("a.back", { href: "#/webhooks" }, icon("back"), "Webhooks"), h("div.runhead", null, h("div.title", null, heading, about), actions), h("div.panel", null, secret, chips, summary, list, more));
  fill(list, skeleton(4));
  mark();
  const keepHead = keeping(about);
  const keepSecret = keeping(secret);
  const draw = deliveryList(list, of, () => !endpoint.disabled);

  function read(query) {
    return Object.hasOwn(STATES, query.get("status")) ? query.get("status") : "";
  }

  function mark() {
    for (const chip of chips.children) {
      if (chip.dataset.state === wanted) chip.setAttribute("aria-current", "true");
      else chip.removeAttribute("aria-current");
    }
  }

  function of(one) {
    return one.run_id ? [h("a", { href: `#/runs/${one.run_id}/webhooks` }, "Run ", short(one.run_id)), ` attempt ${one.attempt}`] : one.event_type === "downed_machines" ? "A machine went down" : "Test";
  }

  async function round(signal) {
    try {
      const asked = wanted;
      const [{ data: found }, { data }] = await Promise.all([call("GET", path, { signal }), call("GET", `${path}/deliveries`, { query: { status: asked, limit }, signal })]);
      if (asked !== wanted) return;
      endpoint = found;
      keepHead(endpoint, drawHead);
      fill(summary, data.total ? `${data.items.length.toLocaleString()} of ${count(data.total, "message")}, newest first` : "");
      more.hidden = data.items.length === data.total || limit >= 1000;
      limit = Math.min(limit, 1000);
      draw(data.items, { disabled: endpoint.disabled, empty: notice("info", wanted ? `No message is ${wanted}` : "No message yet", h("p", null, "Messages are kept for a time that the service's operator chose.")) });
    } catch (error) {
      if (error.code === "webhook_endpoint_not_found") {
        fill(actions);
        fill(root, h("a.back", { href: "#/webhooks" }, icon("back"), "Webhooks"), notice("warn", "No endpoint with this id", h("p", null, "It was deleted, belongs to another organization, or the address is wrong.")));
      }
      throw error;
    }
  }

  function drawHead() {
    fill(heading, theirs(endpoint.url));
    fill(actions, buttons());
    keepSecret(may("webhooks:write"), secretHint);
    return [h("span", null, state(endpoint)), endpoint.description ? h("span", null, theirs(endpoint.description)) : null, h("span.faint", null, "made ", time(endpoint.created_at)), h("span.id", null, id)];
  }

  /** The secret is for programs: it is not shown on a screen. */
  function secretHint() {
    if (!mayManage()) return null;
    const url = new URL(`../v1/${path}/secret`, location.href.split("#")[0]);
    const curl = `curl -sS ${url} -H "Authorization: Bearer $API_KEY"`;
    return h("details.more", null, h("summary", null, "The secret for its signatures"), h("div.snippet", null, h("pre.code", { tabindex: 0, role: "group", "aria-label": "curl" }, curl), copyButton(() => curl, "curl")));
  }

  function buttons() {
    if (!mayManage()) return h("p.obstacle", null, icon("info"), h("span", null, "This key may look, and not send: it lacks the scope webhooks:write."));
    if (endpoint.disabled) {
      const enable = h("button.primary", { type: "button", onclick: () => actOrSay(enable, path, "It is enabled", "PATCH", { disabled: false }) }, "Enable");
      return [h("p.obstacle.soft", null, icon("warn"), h("span", null, "Nothing is sent to it. Once it is enabled, recover what it has missed.")), enable];
    }
    const edit = h("button", { type: "button", onclick: () => openEndpoint(endpoint, () => poll.now(true)) }, "Change …");
    const test = h("button", { type: "button", onclick: () => actOrSay(test, `${path}/test`, "A test is on its way") }, "Send a test");
    return [edit, test, h("button.primary", { type: "button", onclick: recover }, icon("retry"), "Recover …")];
  }

  function recover() {
    const since = h("input", { type: "datetime-local", id: "since", value: local(endpoint.failing_since ?? new Date(now() - 86_400_000).toISOString()) });
    const problem = h("p.error", { role: "alert" });
    const go = h("button.primary", { type: "button" }, "Recover");
    const box = openDialog({
      title: "Recover what it has missed",
      className: "small",
      body: [h("p", null, "Sent again is what failed, and what happened while it was disabled. What it has confirmed is not."), h("label", { htmlFor: "since" }, "Everything since"), since, problem],
      foot: [go, h("button", { type: "button", onclick: () => box.close() }, "Leave it")],
    });
    go.addEventListener("click", async () => {
      fill(problem);
      if (!since.value) {
        fill(problem, "Choose a time.");
        return;
      }
      const error = await act(go, `${path}/recover`, "What it has missed is being sent", "POST", { since: new Date(since.value).toISOString() });
      if (!error) box.close();
      else if (!aborted(error)) fill(problem, error.message);
    });
  }

  return {
    title: () => (endpoint ? `Webhooks: ${endpoint.url}` : "Webhooks"),
    change(to) {
      wanted = read(to.params);
      limit = PAGE;
      mark();
      poll.now(true);
    },
    round,
    handles: (problem) => problem.code === "webhook_endpoint_not_found",
  };
}
