// The key: pasted here, checked with the service, and nowhere else to be seen.

import { Problem, signIn } from "./api.js";
import { fill, h, icon, notice } from "./dom.js";

const WHY = {
  idle: ["info", "Signed out after 30 minutes without input", "What was on the screen is gone, and so is the key. Nothing that was sent is undone."],
  refused: ["warn", "The service does not accept the key any more", "It was revoked or has expired. Ask the person who made it for another one. What you typed into a dialog is there again when you sign in with another key of the same organization within 30 minutes; secrets are not."],
  left: ["info", "Signed out", "The key is no longer in this tab. Copies that you made of it elsewhere still work."],
};

/** The form; `entered()` is called when a key was accepted. */
export function signInView(root, why, entered) {
  const input = h("input", {
    type: "password",
    id: "key",
    autocomplete: "off",
    autocapitalize: "off",
    spellcheck: "false",
    required: true,
    "aria-describedby": "key-error key-help",
  });
  const problem = h("p.error", { id: "key-error", role: "alert" });
  const button = h("button.primary", { type: "submit" }, "Sign in");
  const form = h(
    "form",
    {
      novalidate: true,
      onsubmit: async (event) => {
        event.preventDefault();
        // What is copied from a terminal or a mail brings spaces and the header's first word along.
        const key = input.value.trim().replace(/^Bearer\s+/i, "");
        fill(problem);
        if (!/^[!-~]+$/.test(key)) {
          fill(problem, key ? "A key has no spaces and only plain characters. Copy it again." : "Paste a key first.");
          input.setAttribute("aria-invalid", "true");
          input.focus();
          return;
        }
        button.disabled = true;
        fill(button, "Asking the service …");
        try {
          await signIn(key);
          input.value = "";
          entered();
        } catch (error) {
          input.setAttribute("aria-invalid", "true");
          fill(problem, sentence(error));
          button.disabled = false;
          fill(button, "Sign in");
          input.focus();
        }
      },
    },
    h("label", { htmlFor: "key" }, "API key"),
    input,
    problem,
    button,
  );
  fill(
    root,
    h(
      "div.signin",
      null,
      WHY[why] ? notice(WHY[why][0], WHY[why][1], h("p", null, WHY[why][2])) : null,
      h("h1", { tabindex: -1 }, h("img", { src: "icon.svg", alt: "", width: 36, height: 36 }), "Runs console"),
      h("p.lead", null, "See what runs, find out why it failed, and retry it in place."),
      form,
      h(
        "ul.promises",
        { id: "key-help" },
        h("li", null, icon("key"), "The key stays in this tab, and goes when you sign out, close the tab, or leave it for 30 minutes."),
        h("li", null, icon("info"), h("span", null, "No key yet? Whoever runs the service makes one: ", h("code", null, "python -m app keys create --organization NAME"))),
      ),
    ),
  );
  input.focus();
  return "Sign in";
}

function sentence(error) {
  if (error instanceof Problem && error.status === 401) return "The service does not know this key: it is mistyped, revoked or expired.";
  if (error instanceof Problem && error.status === 403) return "The key is valid, but it may not read runs, and without that the console shows nothing: it needs the scope runs:read.";
  if (error instanceof Problem) return `${error.message} (${error.status}${error.requestId ? `, request ${error.requestId}` : ""})`;
  return `${error.message} Try again.`;
}
