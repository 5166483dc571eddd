// Runs the model, away from the thread that draws the page: transformers.js on ONNX Runtime's WebAssembly build.
//
// In:  {type: "load", base, folder, threads} once, then {type: "generate", ...} and {type: "stop"}.
// Out: progress, ready, chunk, done and error messages, as sent below.
import {
  AutoModelForCausalLM,
  AutoTokenizer,
  BaseStreamer,
  InterruptableStoppingCriteria,
  LogLevel,
  env,
} from "@huggingface/transformers";
import { sentence } from "./sentences.js";

const GLUE = "ort-wasm-simd-threaded.mjs";
const BINARY = "ort-wasm-simd-threaded.wasm";
const REPAINT = 30; // milliseconds between two chunks of text

/** The memory that the runtime computes in; it only ever grows. */
let heap = null;
WebAssembly.Memory = class extends WebAssembly.Memory {
  constructor(descriptor) {
    super(descriptor);
    heap = this;
  }
};

let model, tokenizer, limit;
let failed = false;
let stopping = new InterruptableStoppingCriteria();
const fetched = { model: {}, runtime: {} }; // bytes by address

const send = (message) => self.postMessage(message);

/** Tells the page. What stops the loading has consequences that fail in turn: the first is the reason. */
function fail(error) {
  if (failed) return;
  failed = !model;
  send({ type: "error", sentence: sentence(error), fatal: failed });
}

self.addEventListener("unhandledrejection", (event) => {
  event.preventDefault();
  fail(event.reason);
});
self.addEventListener("message", ({ data }) => {
  if (data.type === "load") load(data).catch(fail);
  else if (data.type === "generate") generate(data).catch(fail);
  else if (data.type === "stop") stopping.interrupt();
});

/** Fetches everything and makes the session. */
async function load({ base, folder, threads }) {
  const start = performance.now();
  const wasm = env.backends.onnx.wasm;
  wasm.numThreads = threads;
  wasm.wasmPaths = { mjs: new URL(GLUE, base).href, wasm: new URL(BINARY, base).href };
  env.logLevel = LogLevel.ERROR;
  env.allowLocalModels = true;
  env.allowRemoteModels = false;
  env.localModelPath = new URL(base).pathname; // transformers.js would take a whole URL for a remote model
  env.useBrowserCache = false; // the browser's own cache knows by its hash whether a file has changed
  env.useWasmCache = false;

  const refused = new Promise((_, reject) => {
    // transformers.js would take an error page for a file, and wait for ever for one that does not come.
    env.fetch = async (url) => {
      try {
        return await download(url, "model");
      } catch (error) {
        reject(error);
        throw error;
      }
    };
  });
  refused.catch(() => {});
  const ready = (async () => {
    const binary = await download(wasm.wasmPaths.wasm, "runtime");
    if (!binary.ok) throw new Error(`${BINARY} is missing beside the page: copy the whole bundle.`);
    wasm.wasmBinary = await binary.arrayBuffer();
    tokenizer = await AutoTokenizer.from_pretrained(folder);
    return AutoModelForCausalLM.from_pretrained(folder, { device: "wasm" });
  })();
  const loaded = await Promise.race([ready, refused]);
  limit = loaded.config.max_position_embeddings ?? Infinity;
  const forward = loaded.forward.bind(loaded);
  // WebAssembly computes without a pause: let messages through before every token, or "stop" would come too late.
  loaded.forward = async (inputs) => {
    await pause();
    return forward(inputs);
  };
  model = loaded;
  wasm.wasmBinary = undefined;
  send({
    type: "ready",
    versions: VERSIONS,
    threads,
    seconds: (performance.now() - start) / 1000,
    heap: heapBytes(),
    downloaded: downloaded(),
    limit,
    chat: Boolean(tokenizer.chat_template),
  });
}

/** A response whose body reports how far it is. A file that is not there is the caller's business, no other error. */
async function download(url, kind) {
  let response;
  try {
    response = await fetch(url);
  } catch {
    throw new Error(`${path(url)} could not be fetched: the server does not answer. Is it still running?`);
  }
  if (response.status === 404) return response;
  if (!response.ok) {
    const reason = (await response.text()).trim() || response.statusText;
    throw new Error(`${path(url)} could not be fetched (${response.status}): ${reason}`);
  }
  let read = 0;
  const counted = new TransformStream({
    transform(chunk, controller) {
      read += chunk.byteLength;
      // A file may be asked for twice, once only to see whether it is there.
      fetched[kind][url] = Math.max(read, fetched[kind][url] ?? 0);
      send({ type: "progress", downloaded: downloaded() });
      controller.enqueue(chunk);
    },
  });
  const { status, headers } = response;
  return new Response(response.body.pipeThrough(counted), { status, headers });
}

/** Continues a prompt, sending text as it comes. */
async function generate({ prompt, tokens, temperature, chat }) {
  const inputs = chat
    ? tokenizer.apply_chat_template([{ role: "user", content: prompt }], {
        add_generation_prompt: true,
        return_dict: true,
      })
    : tokenizer(prompt);
  const given = inputs.input_ids.dims.at(-1);
  if (given === 0) throw new Error("The prompt has no tokens: give at least one word.");
  if (given + tokens > limit)
    throw new Error(
      `${given} tokens of prompt and ${tokens} new ones are more than the model's context of ${limit}: ` +
        "shorten the prompt or ask for fewer tokens.",
    );
  stopping = new InterruptableStoppingCriteria();
  const stream = new Stream();
  // Greedy is the most likely token and nothing else, whatever the model's own settings say.
  const how =
    temperature > 0 ? { do_sample: true, temperature, top_k: 50 } : { do_sample: false, repetition_penalty: 1 };
  await model.generate({
    ...inputs,
    ...how,
    max_new_tokens: tokens,
    streamer: stream,
    stopping_criteria: [stopping],
  });
  send({ type: "done", ...stream.state(), given, stopped: stopping.interrupted });
}

/** Collects tokens, and tells the page what they say a few times a second. */
class Stream extends BaseStreamer {
  constructor() {
    super();
    this.start = performance.now();
    this.shown = 0;
    this.ids = null;
  }

  put([ids]) {
    if (this.ids === null) {
      this.ids = []; // the first call brings the prompt
      return;
    }
    this.last = performance.now();
    this.first ??= this.last;
    this.ids.push(...ids.map(Number));
    if (this.last - this.shown < REPAINT) return;
    this.shown = this.last;
    send({ type: "chunk", ...this.state() });
  }

  end() {}

  state() {
    const ids = this.ids ?? [];
    const between = (this.last - this.first) / 1000;
    return {
      ids,
      text: tokenizer.decode(ids, { skip_special_tokens: true }),
      firstToken: ids.length ? (this.first - this.start) / 1000 : null,
      speed: ids.length > 1 ? (ids.length - 1) / between : null,
      heap: heapBytes(),
    };
  }
}

/** Bytes of the model's files and of the runtime. */
function downloaded() {
  const sum = (files) => Object.values(files).reduce((total, count) => total + count, 0);
  return { model: sum(fetched.model), runtime: sum(fetched.runtime) };
}

const heapBytes = () => heap?.buffer.byteLength ?? null;
const path = (url) => new URL(url, self.location.href).pathname.replace(/^\//, "");

/** Gives the event loop a turn; a timer would be held up by 4 ms. */
function pause() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
