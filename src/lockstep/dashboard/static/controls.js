// Controls: requests to a run that goes on. Each is confirmed, and what came of it is said.

import { post, runPath } from "./api.js";
import { el, say } from "./dom.js";
import { count } from "./format.js";

const LIVE = ["running", "paused"];

export function tell(text, bad = false) {
  const said = document.getElementById("said");
  said.className = bad ? "bad" : "";
  say(said, text);
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => say(said, ""), 8000);
}

// Whether the question was answered with yes.
export function confirmed(question, consequence, yes) {
  const dialog = document.getElementById("confirm");
  say(document.getElementById("question"), question);
  say(document.getElementById("consequence"), consequence);
  say(document.getElementById("yes"), yes);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

export class Controls {
  constructor(name) {
    this.name = name;
    this.number = el("input", { type: "number", id: "workers", min: "1", value: "1", inputmode: "numeric" });
    this.number.addEventListener("input", () => { this.touched = true; });
    this.scale = el("button", { type: "submit" }, "Scale");
    this.checkpoint = el("button", { type: "button", onclick: () => this.ask("checkpoint", 0,
      "Write a checkpoint now?", "The workers rest for a moment.", "Checkpoint", "A checkpoint will be written.") }, "Checkpoint");
    this.pause = el("button", { type: "button", onclick: () => this.togglePause() }, "Pause");
    this.stop = el("button", { type: "button", class: "strong", onclick: () => this.ask("stop", 0,
      "Stop this run?", "It ends after its current step, with a checkpoint: lockstep resume goes on with it.", "Stop", "The run stops after its current step.") }, "Stop");
    const form = el("form", { class: "scale", onsubmit: (event) => {
      event.preventDefault();
      const wanted = Number(this.number.value);
      this.ask("scale", wanted, `Go on with ${count(wanted, "worker")}?`, "The result stays the same, to the bit.", "Scale", `${count(wanted, "worker")} wanted.`);
    } }, el("label", { for: "workers" }, "workers "), this.number, this.scale);
    this.node = el("div", { class: "controls", hidden: true, role: "group", "aria-label": "Requests to the run" },
      form, this.checkpoint, this.pause, this.stop);
  }

  update(facts) {
    this.facts = facts;
    this.node.hidden = !LIVE.includes(facts.status);
    this.number.max = facts.most_workers ?? "";
    if (!this.touched && document.activeElement !== this.number) this.number.value = facts.target ?? 1;
    say(this.pause, facts.status === "paused" ? "Go on" : "Pause");
  }

  togglePause() {
    if (this.facts.status === "paused") this.ask("go_on", 0, "Go on?", "The workers take the next step.", "Go on", "The run goes on.");
    else this.ask("pause", 0, "Pause this run?", "The workers rest, and stay, until it is told to go on.", "Pause", "The run pauses after its current step.");
  }

  async ask(request, number, question, consequence, yes, done) {
    if (!await confirmed(question, consequence, yes)) return;
    try {
      await post(`${runPath(this.name)}/request`, { request, number });
      this.touched = false;
      tell(done);
    } catch (error) {
      tell([error.message, error.fix].filter(Boolean).join(". "), true);
    }
  }
}
