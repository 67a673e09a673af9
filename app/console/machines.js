// Machines and pools: which machine is there, what it runs, setting it aside, and freeing what is reserved.

import { aborted, call, may, newIdempotencyKey, page, poll } from "./api.js";
import { count, fill, h, icon, keeping, notice, openDialog, short, skeleton, status, theirs, time, toast } from "./dom.js";
import * as names from "./names.js";

const ACTIVE = 500; // active runs that are looked through for what a machine does
const SHOWN = 200; // machines on the page; the field above finds the others
const STATES = { connected: "success", disconnected: "cancelled", error: "error" };

/** #/machines */
export function machinesView(root, first) {
  let search = first.params.get("search") ?? "";
  let found = { items: [], total: 0 };
  let doing = new Map(); // machine -> its active run

  const mayChange = may("resources:write");
  const box = h("input", { type: "search", placeholder: "Find by name or id", "aria-label": "Find machines by name or id", autocomplete: "off", spellcheck: "false", maxlength: 200, value: search });
  box.addEventListener("change", () => (location.hash = `#/machines${box.value.trim() ? `?${new URLSearchParams({ search: box.value.trim() })}` : ""}`));
  const list = h("div");
  const title = h("h2", null, "Machines");
  const pools = h("div");
  fill(
    root,
    h("h1.unseen", { tabindex: -1 }, "Machines"),
    h("section", null, title, h("div.filters", { role: "group", "aria-label": "Filters" }, box), mayChange ? null : h("p.faint", null, icon("info"), " This key may look, and not change machines: it lacks the scope resources:write."), list),
    h("section", null, h("h2", null, "Pools"), pools),
  );
  fill(list, skeleton(5));
  fill(pools, skeleton(2));
  const keepList = keeping(list);
  const keepPools = keeping(pools);

  async function round(signal) {
    const asked = search;
    const active = (wanted) => page("runs", { query: { status: wanted, fields: "status,attempt,assigned_machine_id,started_at", limit: ACTIVE }, signal });
    const [{ data }, running, scheduling] = await Promise.all([page("machines", { query: { search: asked, limit: SHOWN }, signal }), active("running"), active("scheduling"), names.load("pools", signal, true)]);
    if (asked !== search) return;
    found = data;
    for (const machine of data.items) names.learn("machines", machine);
    doing = new Map([...scheduling.data.items, ...running.data.items].filter((run) => run.assigned_machine_id).map((run) => [run.assigned_machine_id, run]));
    await names.loadMissing("workflows", [...doing.values()].map((run) => run.workflow_id), signal);
    draw();
  }

  function draw() {
    const sorted = [...found.items].sort((one, other) => names.nameOf("machines", one.id).localeCompare(names.nameOf("machines", other.id)));
    keepList([sorted, [...doing]], () => [
      sorted.length ? h("ul.machines", null, sorted.map(row)) : notice("info", search ? "No machine has this in its name or id" : "No machine is registered", search ? null : h("p", null, "An executor registers its machine with POST /v1/machines. Until then every run waits.")),
      found.total > sorted.length ? h("p.faint", null, `The newest ${sorted.length.toLocaleString()} of ${count(found.total, "machine")}: find others by name.`) : null,
    ]);
    fill(title, "Machines ", h("span.faint", null, found.total.toLocaleString()));
    const all = names.all("pools").sort((one, other) => one.name.localeCompare(other.name));
    keepPools([all, sorted], () => (all.length ? h("ul.machines", null, all.map(poolRow)) : notice("info", "No pool yet", h("p", null, "A pool names machines that can do the same. A program makes one with POST /v1/pools."))));
  }

  function poolRow(pool) {
    const members = found.items.filter((machine) => machine.pools?.some((one) => one.id === pool.id));
    const usable = members.filter((machine) => machine.status === "connected" && machine.is_available).length;
    return h(
      "li",
      null,
      h("div.line", null, h("b", null, theirs(pool.name)), short(pool.id), h("span.faint.end", null, `${count(pool.machine_count, "machine")}${found.total > found.items.length ? "" : `, ${usable} can be given runs`}`)),
      pool.description ? h("p.meta", null, theirs(pool.description)) : null,
      members.length ? h("p.meta", null, members.slice(0, 20).map((machine) => h("span", null, names.named("machines", machine.id))), pool.machine_count > Math.min(20, members.length) ? h("span.faint", null, `and ${pool.machine_count - Math.min(20, members.length)} more`) : null) : null,
    );
  }

  function row(machine) {
    const run = doing.get(machine.id);
    const name = names.nameOf("machines", machine.id);
    return h(
      `li${machine.status === "connected" && machine.is_available ? "" : ".off"}`,
      null,
      h(
        "div.line",
        null,
        icon("machine"),
        h("b", null, h("a", { href: `#/runs?machine=${machine.id}` }, names.named("machines", machine.id))),
        short(machine.id),
        status(machine.status, STATES[machine.status]),
        machine.is_available ? null : h("span.tag", null, "set aside"),
        h("span.faint.end", null, "last seen ", time(machine.last_seen)),
      ),
      machine.pools?.length ? h("p.meta", null, h("span.faint", null, "in ", machine.pools.map((pool, index) => [index ? ", " : "", theirs(pool.name)]))) : null,
      h(
        "p.meta",
        null,
        run
          ? [status(run.status), h("a", { href: `#/runs/${run.id}` }, names.named("workflows", run.workflow_id)), h("span.faint", null, `attempt ${run.attempt}`), run.started_at ? h("span", null, "for ", time(run.started_at, "since")) : h("span.faint", null, "assigned, not started yet")]
          : h("span.faint", null, "runs nothing"),
        machine.reserved_session_id ? h("span", null, "reserved for session ", h("a", { href: `#/runs?session=${machine.reserved_session_id}` }, short(machine.reserved_session_id))) : null,
      ),
      mayChange
        ? h(
            "div.line",
            null,
            h("button", { type: "button", onclick: (event) => change(event.currentTarget, machine, { is_available: !machine.is_available }, machine.is_available ? `${name} is given no more runs` : `${name} is given runs again`) }, machine.is_available ? "Set aside" : "Give it runs again", h("span.unseen", null, ` ${name}`)),
            machine.reserved_session_id ? h("button", { type: "button", onclick: () => free(machine, name) }, "Free the reservation …", h("span.unseen", null, ` of ${name}`)) : null,
          )
        : null,
    );
  }

  async function change(button, machine, body, said) {
    if (button.disabled) return false;
    button.disabled = true;
    try {
      await call("PATCH", `machines/${machine.id}`, { body: JSON.stringify(body), idempotencyKey: newIdempotencyKey() });
      toast(said);
      poll.now(true);
      return true;
    } catch (error) {
      if (!aborted(error)) toast(error.message, "bad");
      return false;
    } finally {
      button.disabled = false;
    }
  }

  function free(machine, name) {
    const act = h("button.danger", { type: "button" }, "Free it");
    const dialog = openDialog({
      title: ["Free ", theirs(name), "?"],
      className: "small",
      body: h("p", null, "The session ends on this machine. Its active runs are cancelled, and any run can have the machine."),
      foot: [act, h("button", { type: "button", onclick: () => dialog.close() }, "Change nothing")],
    });
    act.addEventListener("click", async () => {
      if (await change(act, machine, { reserved_session_id: null }, `${name} is free`)) dialog.close();
    });
  }

  return {
    title: () => "Machines",
    change({ params }) {
      search = params.get("search") ?? "";
      if (document.activeElement !== box) box.value = search;
      poll.now(true);
    },
    round,
  };
}
