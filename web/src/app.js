// The page: a prompt, what the model makes of it in this browser, and what the report says about the model.
import { continuations, showReport } from "./figures.js";
import { bytes, duration, element, number } from "./format.js";
import { mostThreads, obstacle, usualThreads } from "./probe.js";
import { sentence } from "./sentences.js";

const BASE = new URL("./", document.baseURI).href;
const FOLDER = "model"; // where the exported folder lies, beside this page
const MEMORY_EVERY = 20_000; // milliseconds; the browser measures with a garbage collection

const at = (id) => document.getElementById(id);
const written = {}; // what the last done message said, for the facts below
let report = null;
let worker = null;
let asked = null;
let total = 0;

start().catch((error) => complain(sentence(error)));

async function start() {
  const threads = mostThreads();
  const chosen = Math.min(threads, Number(new URLSearchParams(location.search).get("threads")) || usualThreads());
  at("threads").replaceChildren(
    ...Array.from({ length: threads }, (_, n) => element("option", { value: n + 1 }, String(n + 1))),
  );
  at("threads").value = String(chosen);
  await showFolder();
  const reason = obstacle();
  showFacts();
  if (reason) {
    complain(reason);
    return;
  }
  at("form").addEventListener("submit", generate);
  at("stop").addEventListener("click", () => worker.postMessage({ type: "stop" }));
  at("temperature").addEventListener("input", showTemperature);
  at("threads").addEventListener("change", load);
  showTemperature();
  load();
}

/** Report, links and the size of the download; the page works without a report. */
async function showFolder() {
  const manifest = await json(`${FOLDER}/compot/manifest.json`);
  const bundle = await json("bundle.json");
  const fetched = /^(onnx\/.*|config\.json|generation_config\.json|tokenizer(_config)?\.json)$/;
  const sizes = (manifest?.files ?? []).filter(({ path }) => fetched.test(path)).map((file) => file.bytes);
  total = [...sizes, bundle?.files.find(({ path }) => path.endsWith(".wasm"))?.bytes ?? 0].reduce((a, b) => a + b, 0);
  const names = new Set((manifest?.files ?? []).map(({ path }) => path));
  const links = [
    ["Full report", "compot/report.html"],
    ["report.json", "compot/report.json"],
    ["Model card", "README.md"],
  ].filter(([, path]) => names.has(path));
  const anchor = (label, href) => element("a", { href, target: "_blank", rel: "noopener" }, label);
  at("links").replaceChildren(
    ...links.map(([label, path]) => anchor(label, `${FOLDER}/${path}`)),
    ...(bundle ? [anchor("Licenses", "licenses.txt")] : []),
  );
  try {
    report = await json(`${FOLDER}/compot/report.json`);
    if (report) showReport(report);
  } catch {
    report = null;
  }
  if (!report) at("subtitle").textContent = "There is no report that this page can read, so no figures are shown.";
  suggest();
}

/** Prompts whose greedy text the report has. */
function suggest() {
  const prompts = [...continuations(report).keys()];
  at("suggestions").replaceChildren(
    element("span", { class: "quiet" }, "From the report:"),
    ...prompts.map((prompt) => {
      const button = element("button", { type: "button", title: prompt }, prompt.trim());
      button.addEventListener("click", () => {
        at("prompt").value = prompt;
        at("prompt").focus();
      });
      return button;
    }),
  );
  at("suggestions").hidden = prompts.length === 0;
}

/** Starts the worker, afresh if there is one. */
function load() {
  worker?.terminate();
  state("loading");
  worker = new Worker(new URL("worker.js", BASE), { type: "module" });
  worker.addEventListener("message", ({ data }) => ANSWERS[data.type](data));
  worker.addEventListener("error", (event) => {
    event.preventDefault();
    complain(`The worker that runs the model could not start: ${event.message || "worker.js is missing"}.`);
  });
  worker.postMessage({ type: "load", base: BASE, folder: FOLDER, threads: Number(at("threads").value) });
}

const ANSWERS = {
  progress({ downloaded }) {
    const loaded = downloaded.model + downloaded.runtime;
    at("progress").value = total ? Math.min(1, loaded / total) : 0;
    at("progress-text").textContent = loaded < total ? `${bytes(loaded)} of ${bytes(total)}` : "Getting ready …";
    showDownload(downloaded);
  },
  ready(facts) {
    Object.assign(written, facts);
    at("progress-text").textContent = "";
    at("tokens").max = Math.min(4096, facts.limit);
    at("chat-label").hidden = !facts.chat;
    showDownload(facts.downloaded);
    showHeap(facts.heap);
    showFacts();
    state("ready");
    measureMemory();
  },
  chunk: showText,
  done(result) {
    showText(result);
    note(result);
    state("ready");
    at("text").dataset.ids = JSON.stringify(result.ids);
    measureMemory();
  },
  error({ sentence: words, fatal }) {
    complain(words);
    if (!fatal) state("ready");
  },
};

function generate(event) {
  event.preventDefault();
  asked = {
    type: "generate",
    prompt: at("prompt").value,
    tokens: Number(at("tokens").value),
    temperature: Number(at("temperature").value),
    chat: !at("chat-label").hidden && at("chat").checked,
  };
  at("alert").hidden = true;
  at("note").textContent = "";
  at("note").classList.remove("same");
  at("given").textContent = asked.prompt;
  at("added").textContent = "";
  delete at("text").dataset.ids;
  state("busy");
  worker.postMessage(asked);
}

function showText({ text, firstToken, speed, heap }) {
  const box = at("text");
  const following = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  at("added").textContent = text;
  if (following) box.scrollTop = box.scrollHeight;
  at("first-token").textContent = duration(firstToken);
  at("speed").textContent = speed === null ? "–" : number(speed, 3);
  showHeap(heap);
}

/** How the text ended, and whether it is what onnxruntime wrote when the folder was made. */
function note({ ids, text, given, stopped }) {
  const tokens = `${given} tokens read, ${ids.length} written${stopped ? ", then stopped" : ""}.`;
  const expected = asked.temperature > 0 || asked.chat ? undefined : continuations(report).get(asked.prompt);
  let verdict = "";
  if (expected && text) {
    const exact = agreement(text, expected.exact);
    const shipped = agreement(text, expected.exported);
    verdict = ` ${exact.same ? "The same text as" : `Differs ${exact.where} from`} onnxruntime's, computed exactly, in the report`;
    verdict += exact.same === shipped.same ? "." : shipped.same ? ", but not from its text with int8 activations." : `; its text with int8 activations differs ${shipped.where}.`;
    at("note").classList.toggle("same", exact.same);
  }
  at("note").textContent = tokens + verdict;
}

/** Whether two texts agree as far as both go. */
function agreement(text, other) {
  const length = Math.min(other.length, text.length);
  let common = 0;
  while (common < length && other[common] === text[common]) common += 1;
  return { same: common === length, where: `after ${common} of ${length} characters` };
}

function showDownload({ model, runtime }) {
  at("download").textContent = bytes(model);
  at("download-unit").textContent = `model, and ${bytes(runtime)} of runtime`;
}

function showHeap(heap) {
  if (heap !== null) at("heap").textContent = bytes(heap);
}

/** Memory of the whole page, workers included, where the browser tells. */
async function measureMemory() {
  if (!self.crossOriginIsolated || !performance.measureUserAgentSpecificMemory) return;
  if (performance.now() - (measureMemory.last ?? -Infinity) < MEMORY_EVERY) return;
  measureMemory.last = performance.now();
  try {
    const found = await performance.measureUserAgentSpecificMemory();
    at("heap-unit").textContent = `of the runtime; whole page ${bytes(found.bytes)}`;
  } catch {
    // The browser does not tell after all: the runtime's heap stays the only figure.
  }
}

function showTemperature() {
  const value = Number(at("temperature").value);
  at("temperature-value").textContent = value > 0 ? value.toFixed(1) : "greedy";
}

function showFacts() {
  const { versions, threads, seconds } = written;
  const rows = [
    ["Runtime", versions ? `onnxruntime-web ${versions["onnxruntime-web"].split("-")[0]}, WebAssembly` : "not started"],
    ["Library", versions ? `transformers.js ${versions["transformers.js"]}` : "–"],
    ["SIMD", obstacle() ? "no" : "yes"],
    ["Arithmetic", versions ? "float32, weights as stored" : "–"],
    ["Threads", threads ? `${threads} of ${navigator.hardwareConcurrency ?? "?"}` : "–"],
    ["Ready after", duration(seconds ?? null)],
  ];
  if (!self.crossOriginIsolated) rows.push(["Isolated", "no, so only one thread; the server would have to send COOP and COEP headers"]);
  at("facts").replaceChildren(
    ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]),
  );
}

function state(name) {
  document.body.dataset.state = name;
  at("generate").disabled = name !== "ready";
  at("stop").disabled = name !== "busy";
  at("threads").disabled = name === "busy";
}

function complain(words) {
  at("alert").textContent = words;
  at("alert").hidden = false;
  state("broken");
}

/** A parsed file, or null where there is none. */
async function json(path) {
  const response = await fetch(new URL(path, BASE));
  return response.ok ? response.json() : null;
}
