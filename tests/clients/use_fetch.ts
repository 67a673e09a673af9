// Uses openapi-fetch with the types that openapi-typescript made of /openapi.json.
import { readFileSync } from "node:fs";

import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

const job: { url: string; key: string; workflow_id: string } = JSON.parse(readFileSync(0, "utf8"));
const client = createClient<paths>({ baseUrl: job.url, headers: { Authorization: `Bearer ${job.key}` } });

function given<T>(reply: { data?: T; error?: unknown }): T {
  if (reply.data === undefined) throw new Error(JSON.stringify(reply.error));
  return reply.data;
}
function expect(holds: boolean, what: string): void {
  if (!holds) throw new Error(what);
}

const inputs = { customer: "Ada", lines: [{ sum: 1.5 }, null] };
const created = given(await client.POST("/v1/runs", { body: { workflow_id: job.workflow_id, input_values: inputs } }));
const path = { run_id: created.id };
given(await client.PATCH("/v1/runs/{run_id}", { params: { path }, body: { status: "running" } }));
const content = Buffer.from("a,b\n\0\xff", "latin1");
const attachment = given(
  await client.POST("/v1/run-attachments", {
    body: {
      run_id: created.id,
      filename: "report.csv",
      content: content.toString("base64"),
      content_type: "text/csv",
      attachment_type: "output",
    },
  }),
);
const file = given(
  await client.GET("/v1/run-attachments/{attachment_id}/download", {
    params: { path: { attachment_id: attachment.id } },
    parseAs: "arrayBuffer",
  }),
);
expect(Buffer.from(file).equals(content), "the download is not what was uploaded");
given(await client.PATCH("/v1/runs/{run_id}", { params: { path }, body: { status: "error" } }));

const body: components["schemas"]["RunRetry"] = {
  sensitive_input_values: { password: "s3cret" },
  file_inputs: [{ filename: "invoice.pdf", content: Buffer.from("hello").toString("base64") }],
};
expect(given(await client.POST("/v1/runs/{run_id}/retry/dry-run", { params: { path }, body })).would_retry, "dry run");
const header = { "Idempotency-Key": "once" };
given(await client.POST("/v1/runs/{run_id}/retry", { params: { path, header }, body }));
const again = given(await client.POST("/v1/runs/{run_id}/retry", { params: { path, header }, body }));
expect(again.attempt === 2, "the resend was a second retry");
const page = given(await client.GET("/v1/runs", { params: { query: { workflow_id: job.workflow_id } } }));
expect(page.items.map((run) => run.id).join() === created.id, "the list");

const endpoint = given(
  await client.POST("/v1/webhook-endpoints", { body: { url: "https://example.com/hooks", description: "Billing" } }),
);
const changed = given(
  await client.PATCH("/v1/webhook-endpoints/{webhook_endpoint_id}", {
    params: { path: { webhook_endpoint_id: endpoint.id } },
    body: { description: null },
  }),
);
expect(changed.description === null && changed.url === "https://example.com/hooks", "the endpoint");
console.log(JSON.stringify({ run_id: created.id, attempt: again.attempt, inputs: again.input_values }));
