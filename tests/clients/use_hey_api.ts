// Uses the client that hey-api made of /openapi.json.
import { readFileSync } from "node:fs";

import { client } from "./hey/client.gen.js";
import * as api from "./hey/sdk.gen.js";
import type { RunRetry } from "./hey/types.gen.js";

const job: { url: string; key: string; workflow_id: string } = JSON.parse(readFileSync(0, "utf8"));
client.setConfig({ baseUrl: job.url, headers: { Authorization: `Bearer ${job.key}` } });

function expect(holds: boolean, what: string): void {
  if (!holds) throw new Error(what);
}
const throwOnError = true;

const inputs = { customer: "Ada", lines: [{ sum: 1.5 }, null] };
const { data: created } = await api.createRun({
  body: { workflow_id: job.workflow_id, input_values: inputs },
  throwOnError,
});
const path = { run_id: created.id };
await api.updateRun({ path, body: { status: "running" }, throwOnError });
const content = Buffer.from("a,b\n\0\xff", "latin1");
const { data: attachment } = await api.createRunAttachment({
  body: {
    run_id: created.id,
    filename: "report.csv",
    content: content.toString("base64"),
    content_type: "text/csv",
    attachment_type: "output",
  },
  throwOnError,
});
const { data: file } = await api.downloadRunAttachment({
  path: { attachment_id: attachment.id },
  parseAs: "blob",
  throwOnError,
});
expect(Buffer.from(await (file as Blob).arrayBuffer()).equals(content), "the download is not what was uploaded");
await api.updateRun({ path, body: { status: "error" }, throwOnError });

const body: RunRetry = {
  sensitive_input_values: { password: "s3cret" },
  file_inputs: [{ filename: "invoice.pdf", content: Buffer.from("hello").toString("base64") }],
};
expect((await api.dryRunRetry({ path, body, throwOnError })).data.would_retry, "dry run");
const headers = { "Idempotency-Key": "once" };
await api.retryRun({ path, headers, body, throwOnError });
const { data: again } = await api.retryRun({ path, headers, body, throwOnError });
expect(again.attempt === 2, "the resend was a second retry");
const { data: page } = await api.listRuns({ query: { workflow_id: job.workflow_id }, throwOnError });
expect(page.items.map((run) => run.id).join() === created.id, "the list");

const { data: endpoint } = await api.createWebhookEndpoint({
  body: { url: "https://example.com/hooks", description: "Billing" },
  throwOnError,
});
const { data: changed } = await api.updateWebhookEndpoint({
  path: { webhook_endpoint_id: endpoint.id },
  body: { description: null },
  throwOnError,
});
expect(changed.description === null && changed.url === "https://example.com/hooks", "the endpoint");
console.log(JSON.stringify({ run_id: created.id, attempt: again.attempt, inputs: again.input_values }));
