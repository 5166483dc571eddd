// Bundles the page into ../compot_deploy/web-bundle: what `compot-deploy serve` serves and the wheel carries.
//
// The folder appears whole or not at all. bundle.json lists its files with size, type and sha256; the server serves
// those and no others. licenses.txt has the terms of everything that was bundled.
import { createHash } from "node:crypto";
import { cpSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const target = join(here, "..", "compot_deploy", "web-bundle");
const staging = `${target}.staging`;
const runtime = join(here, "node_modules", "onnxruntime-web");
const TYPES = {
  css: "text/css; charset=utf-8",
  html: "text/html; charset=utf-8",
  js: "text/javascript; charset=utf-8",
  json: "application/json",
  mjs: "text/javascript; charset=utf-8",
  svg: "image/svg+xml",
  txt: "text/plain; charset=utf-8",
  wasm: "application/wasm",
};

// The terms of https://github.com/microsoft/onnxruntime/blob/main/LICENSE.
const MICROSOFT_MIT = `MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

ONNX Runtime contains other people's work too; their terms are listed at
https://github.com/microsoft/onnxruntime/blob/main/ThirdPartyNotices.txt`;

const read = (path) => JSON.parse(readFileSync(path, "utf8"));
const version = (name) => read(join(here, "node_modules", name, "package.json")).version;

rmSync(staging, { recursive: true, force: true });
mkdirSync(staging, { recursive: true });
for (const name of ["index.html", "style.css", "icon.svg"]) cpSync(join(here, "src", name), join(staging, name));
// The WebAssembly build of ONNX Runtime without WebGPU is half the size of the others and runs everywhere.
for (const name of ["ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"])
  cpSync(join(runtime, "dist", name), join(staging, name));

const result = await build({
  entryPoints: [join(here, "src", "app.js"), join(here, "src", "worker.js")],
  outdir: staging,
  bundle: true,
  format: "esm",
  target: ["es2022"],
  minify: true,
  legalComments: "none",
  metafile: true,
  logLevel: "warning",
  // The glue code stays a file of its own, which the page's security policy can name, rather than a blob: URL.
  alias: { "onnxruntime-web/webgpu": join(runtime, "dist", "ort.wasm.min.mjs") },
  define: {
    VERSIONS: JSON.stringify({
      "transformers.js": version("@huggingface/transformers"),
      "onnxruntime-web": version("onnxruntime-web"),
    }),
  },
});

// transformers.js comes with the other two inside.
const bundled = new Set(["onnxruntime-web", "@huggingface/jinja", "@huggingface/tokenizers"]);
for (const path of Object.keys(result.metafile.inputs)) {
  const found = path.match(/.*node_modules\/((?:@[^/]+\/)?[^/]+)\//);
  if (found) bundled.add(found[1]);
}
writeFileSync(join(staging, "licenses.txt"), [...bundled].sort().map(terms).join("\n"));

const files = readdirSync(staging).sort().map((path) => {
  const bytes = readFileSync(join(staging, path));
  const type = TYPES[path.split(".").pop()];
  if (!type) throw new Error(`${path}: no media type is known for it; add one to TYPES in build.mjs.`);
  return { path, bytes: bytes.length, sha256: createHash("sha256").update(bytes).digest("hex"), type };
});
writeFileSync(join(staging, "bundle.json"), `${JSON.stringify({ format: 1, files }, null, 2)}\n`);

rmSync(target, { recursive: true, force: true });
renameSync(staging, target);
const total = files.reduce((sum, file) => sum + file.bytes, 0);
console.log(`compot_deploy/web-bundle: ${files.length} files, ${total.toLocaleString("en")} bytes`);

/** Name, version and license text of a package. ONNX Runtime's packages name their license without including it. */
function terms(name) {
  const folder = join(here, "node_modules", name);
  const { license, version, homepage } = read(join(folder, "package.json"));
  const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry));
  if (!file && !(license === "MIT" && name.startsWith("onnxruntime-")))
    throw new Error(`${name}: no license file was found; bundle it only with its terms.`);
  const text = file ? readFileSync(join(folder, file), "utf8") : MICROSOFT_MIT;
  return `${"=".repeat(80)}\n${name} ${version} (${license})${homepage ? ` ${homepage}` : ""}\n\n${text}\n`;
}
