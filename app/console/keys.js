// API keys: who may call, with what, and who still does. Never a key itself; keys are made and revoked by the command line.

import { me, page, poll } from "./api.js";
import { count, fill, h, icon, keeping, now, notice, skeleton, theirs, time } from "./dom.js";

const PAGE = 200;

/** #/keys */
export function keysView(root) {
  let limit = PAGE;
  const list = h("div");
  const more = h("button", { type: "button", hidden: true, onclick: () => ((limit = Math.min(1000, limit * 5)), poll.now(true)) }, "Show more");
  const keep = keeping(list);
  fill(
    root,
    h("h1.unseen", { tabindex: -1 }, "API keys"),
    h(
      "section",
      null,
      h("h2", null, "API keys"),
      h("p.faint", null, "A key is made and revoked on the service's own machine: ", h("code", null, "python -m app keys create --organization NAME"), " and ", h("code", null, "python -m app keys revoke ID"), ". It holds within seconds."),
      list,
      more,
    ),
  );
  fill(list, skeleton(4));

  function row(key) {
    const isGone = Boolean(key.revoked_at) || (key.expires_at && Date.parse(key.expires_at) <= now());
    return h(
      `li${isGone ? ".off" : ""}`,
      null,
      h(
        "div.line",
        null,
        icon("key"),
        h("b", null, key.name ? theirs(key.name) : h("span.faint", null, "no name")),
        h("span.id", null, key.id),
        key.id === me.key_id ? h("span.tag", null, "this key") : null,
        h("span.end", null, key.revoked_at ? h("span.bad", null, "revoked ", time(key.revoked_at)) : isGone ? h("span.bad", null, "expired") : key.last_used_at ? ["last used ", time(key.last_used_at)] : h("span.faint", null, "never used")),
      ),
      h(
        "p.meta",
        null,
        h("span", null, key.scopes.map((scope) => h("code.tag", null, scope === "*" ? "* (everything)" : scope))),
        key.machine_id ? h("span", null, "bound to machine ", h("span.id", null, key.machine_id)) : null,
        key.user_id ? h("span", null, "user ", h("span.id", null, key.user_id)) : null,
        h("span.faint", null, "made ", time(key.created_at)),
        key.expires_at && !isGone ? h("span", null, "expires ", time(key.expires_at, "when")) : null,
      ),
    );
  }

  return {
    title: () => "API keys",
    change: () => poll.now(true),
    async round(signal) {
      const { data } = await page("keys", { query: { limit }, signal });
      more.hidden = data.items.length >= data.total || limit >= 1000;
      keep(data.items, () => (data.items.length ? [h("ul.machines", null, data.items.map(row)), h("p.faint", null, count(data.total, "key"))] : notice("info", "No key")));
    },
  };
}
