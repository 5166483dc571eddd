// What this browser can do, found out before anything large is fetched.

/** The smallest module with a SIMD instruction: a function that drops i8x16.splat(0). */
const SIMD = [
  0, 97, 115, 109, 1, 0, 0, 0, // "\0asm", version 1
  1, 4, 1, 96, 0, 0, // type 0: () -> ()
  3, 2, 1, 0, // function 0 has type 0
  10, 9, 1, 7, 0, 65, 0, 253, 15, 26, 11, // i32.const 0, i8x16.splat, drop, end
];

/** Why the model cannot run here, in one sentence, or null. */
export function obstacle() {
  if (typeof WebAssembly !== "object")
    return "This browser has no WebAssembly, so the model cannot run in it: use a recent Chrome, Edge, Firefox or Safari (without lockdown mode).";
  if (!WebAssembly.validate(new Uint8Array(SIMD)))
    return "This browser has no WebAssembly SIMD, which the runtime needs, so the model cannot run in it: use Chrome or Edge 91, Firefox 89, Safari 16.4 or newer.";
  try {
    new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true });
  } catch {
    return "This browser has no shared WebAssembly memory, which the runtime needs, so the model cannot run in it: use a recent Chrome, Edge, Firefox or Safari.";
  }
  return null;
}

/** Threads that may be asked for: more than one only where the server isolates the page. */
export function mostThreads() {
  return self.crossOriginIsolated ? Math.max(1, Math.min(16, navigator.hardwareConcurrency ?? 1)) : 1;
}

/** Half of the cores, four at most: more of them wait for each other. */
export function usualThreads() {
  return Math.max(1, Math.min(4, Math.floor(mostThreads() / 2)));
}
