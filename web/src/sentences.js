// What went wrong, in one sentence, whatever was thrown.

const NO_MEMORY = /out of memory|bad_alloc|allocation failed|could not allocate|Invalid array buffer length/i;

/** One sentence for the reader; runtimes throw errors, strings and bare numbers. */
export function sentence(error) {
  const text = String(error?.message ?? error).replace(/\s+/g, " ").trim();
  if (NO_MEMORY.test(text) || error instanceof RangeError)
    return "The model does not fit into the memory of this page (a page may use 4 GB at most): close other tabs, or export a smaller model.";
  const missing = text.match(/file was not found locally at "([^"]+)"/);
  if (missing) return `${missing[1].replace(/^.*\/model\//, "")} is missing on the server: export the folder again.`;
  if (/^\d+$/.test(text)) return `The runtime gave up (code ${text}); the browser's console has its message.`;
  const plain = text.replace(/^(Error|TypeError): /, "").replace(/^no available backend found\. ERR: \[wasm\] /, "");
  return plain.length > 400 ? `${plain.slice(0, 399)}…` : plain;
}
