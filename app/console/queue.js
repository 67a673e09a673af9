// The queue: which machine runs what, and which lanes wait for what, the longest wait first.

import { call, page, poll } from "./api.js";
import { bar, count, fill, h, icon, keeping, notice, now, reason, short, silent, skeleton, status, theirs, time } from "./dom.js";
import * as names from "./names.js";

const FIELDS = "status,attempt,assigned_machine_id,started_at,last_report_at,is_reporting,scheduling_reason,created_at";
const ACTIVE = 500; // active runs that are looked through for what a machine does

export function queueView(root) {
  let lanes; // undefined: not known yet; null: the service has no such address
  let held = 0; // runs that wait for their start time, in no lane
  let doing = new Map(); // machine -> its active run

  const waiting = h("div");
  const machines = h("div");
  const laneTitle = h("h2", null, "Waiting");
  const machineTitle = h("h2", null, "Machines");
  fill(root, h("h1.unseen", { tabindex: -1 }, "Queue"), h("div.columns", null, h("section", null, laneTitle, waiting), h("section", null, machineTitle, machines)));
  fill(waiting, skeleton(5));
  fill(machines, skeleton(5));
  const keepLanes = keeping(waiting);
  const keepMachines = keeping(machines);

  async function round(signal) {
    const active = (wanted) => page("runs", { query: { status: wanted, fields: FIELDS, limit: ACTIVE }, signal });
    const [queue, running, scheduling] = await Promise.all([loadLanes(signal), active("running"), active("scheduling"), names.load("machines", signal, true), names.load("pools", signal)]);
    lanes = queue;
    doing = new Map([...scheduling.data.items, ...running.data.items].filter((run) => run.assigned_machine_id).map((run) => [run.assigned_machine_id, run]));
    const waits = scheduling.data.items.filter((run) => !run.assigned_machine_id);
    await names.loadMissing("workflows", [...doing.values()].map((run) => run.workflow_id), signal);
    draw(waits, scheduling.data.total);
  }

  async function loadLanes(signal) {
    try {
      const { data } = await call("GET", "queue", { signal });
      held = data.held ?? 0;
      return data.items;
    } catch (error) {
      if (error.code === "route_not_found") return null;
      throw error;
    }
  }

  function draw(waits, total) {
    const all = names.all("machines");
    const minute = Math.floor(now() / 5000); // bars grow now and then, ages by themselves
    keepLanes([lanes, held, waits.length, total, minute, all.length], () => (lanes === null ? withoutLanes(waits, total) : [laneList(), held ? h("p.faint", null, icon("scheduling"), ` ${held >= 1000 ? "1,000 or more runs are" : held === 1 ? "1 run is" : `${held} runs are`} held until a start time.`) : null]));
    keepMachines([all, [...doing], minute], () => machineList(all));
    fill(laneTitle, "Waiting ", h("span.faint", null, lanes ? lanes.reduce((sum, lane) => sum + lane.waiting, 0).toLocaleString() : total.toLocaleString()));
    const free = all.filter((machine) => usable(machine) && !doing.has(machine.id)).length;
    fill(machineTitle, "Machines ", h("span.faint", null, `${all.length.toLocaleString()}, ${free.toLocaleString()} free`));
  }

  // --- lanes ----------------------------------------------------------------------------------------------------------

  function laneList() {
    if (!lanes.length) return notice("info", "No run waits for a machine", h("p", null, "Every queued run has one."));
    const oldest = Math.max(...lanes.map((lane) => now() - Date.parse(lane.oldest_queued_at)), 1);
    return h(
      "ol.lanes",
      null,
      lanes.map((lane) =>
        h(
          "li",
          null,
          h("div.line", null, h("b", null, wants(lane.wants ?? {})), h("span.faint.end", null, lane.waiting >= 1000 ? "1,000 or more" : count(lane.waiting, "run"))),
          h("div.life", null, bar((now() - Date.parse(lane.oldest_queued_at)) / oldest, "waited"), time(lane.oldest_queued_at, "since")),
          h("p.meta", null, lane.reason ? h("span", null, reason(lane.reason)) : null, lane.head_run_id ? h("span", null, "next: ", h("a", { href: `#/runs/${lane.head_run_id}` }, short(lane.head_run_id))) : null),
        ),
      ),
    );
  }

  function wants({ session_id: session, machine_id: machine, pool_ids: pools }) {
    if (session) return ["Session ", h("a", { href: `#/runs?session=${session}` }, short(session)), machine ? [" on ", names.named("machines", machine)] : ""];
    if (machine) return ["Machine ", names.named("machines", machine)];
    if (pools?.length) return [pools.length === 1 ? "Pool " : "Pools ", pools.map((pool, index) => [index ? " + " : "", names.named("pools", pool)])];
    return "Any machine";
  }

  /** A service without /v1/queue: what the list of runs says. */
  function withoutLanes(waits, total) {
    if (!total) return notice("info", "No run waits for a machine");
    const oldest = [...waits].sort((one, other) => one.created_at.localeCompare(other.created_at)).slice(0, 50);
    return [
      h("p.faint", null, "This service does not tell its lanes. These are the runs that wait, the oldest first."),
      h("ol.lanes", null, oldest.map((run) => h("li", null, h("div.line", null, h("a", { href: `#/runs/${run.id}` }, short(run.id)), h("span.faint.end", null, time(run.created_at, "age"))), h("p.meta", null, run.scheduling_reason ? reason(run.scheduling_reason) : null)))),
    ];
  }

  // --- machines -------------------------------------------------------------------------------------------------------

  function usable(machine) {
    return machine.status === "connected" && machine.is_available;
  }

  function machineList(all) {
    if (!all.length) return notice("info", "No machine is registered", h("p", null, "An executor registers its machine with POST /v1/machines. Until then every run waits."));
    const busySince = (machine) => Date.parse(doing.get(machine.id)?.started_at ?? "") || 0;
    const longest = Math.max(1, ...all.map((machine) => (busySince(machine) ? now() - busySince(machine) : 0)));
    const rank = (machine) => (doing.has(machine.id) ? 0 : usable(machine) ? 1 : 2);
    const sorted = [...all].sort((one, other) => rank(one) - rank(other) || (busySince(one) || Infinity) - (busySince(other) || Infinity) || names.nameOf("machines", one.id).localeCompare(names.nameOf("machines", other.id)));
    return h(
      "ul.machines",
      null,
      sorted.map((machine) => {
        const run = doing.get(machine.id);
        return h(
          `li${usable(machine) ? "" : ".off"}`,
          null,
          h(
            "div.line",
            null,
            icon("machine"),
            h("b", null, h("a", { href: `#/runs?machine=${machine.id}` }, names.named("machines", machine.id))),
            machine.pools?.length ? h("span.faint", null, machine.pools.map((pool, index) => [index ? ", " : "", theirs(pool.name)])) : null,
            h("span.faint.end", null, machine.status !== "connected" ? ["offline, last seen ", time(machine.last_seen)] : !machine.is_available ? "set aside" : run ? "" : "free"),
          ),
          run
            ? [
                h("p.meta", null, status(run.status), h("a", { href: `#/runs/${run.id}` }, names.named("workflows", run.workflow_id)), h("span.faint", null, `attempt ${run.attempt}`), silent(run) ? h(`span.${silent(run).isAmber ? "wait" : "faint"}`, null, icon("warn"), "no report for ", silent(run).time) : null),
                run.started_at ? h("div.life", null, bar((now() - Date.parse(run.started_at)) / longest, "ran"), time(run.started_at, "since")) : h("p.faint", null, "assigned, not started yet"),
              ]
            : null,
          machine.reserved_session_id ? h("p.meta", null, h("span", null, "reserved for session ", h("a", { href: `#/runs?session=${machine.reserved_session_id}` }, short(machine.reserved_session_id)))) : null,
        );
      }),
    );
  }

  return { title: () => "Queue", change: () => poll.now(true), round };
}
