// The report's numbers, drawn beside the playground.
import { bytes, element, number, percent } from "./format.js";

/** Shows verdict, sizes and losses of a parsed report.json. */
export function showReport(report) {
  const { sizes, accuracy } = report;
  const name = report.model.split(/[\\/]/).filter(Boolean).pop() ?? report.model;
  const shown = name.startsWith("the model") ? name[0].toUpperCase() + name.slice(1) : name;
  text("model", shown);
  document.title = `${shown} · compot-deploy`;
  const parameters = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
  text(
    "subtitle",
    `${parameters.format(sizes.fp16 / 2)} parameters, ${number(sizes.fp16 / sizes.weights, 2)} times smaller than fp16, ` +
      `${number(sizes.plain_int4 / sizes.weights, 2)} times smaller than plain int4`,
  );
  showVerdict(report);
  showSizes(sizes);
  showAccuracy(accuracy);
}

/** Greedy texts by prompt, as onnxruntime wrote them when the folder was made. */
export function continuations(report) {
  return new Map((report?.accuracy.continuations ?? []).map((texts) => [texts.prompt, texts]));
}

function showVerdict(report) {
  const verdict = document.getElementById("verdict");
  verdict.textContent = report.passed ? "Passed its gate" : "Failed its gate";
  verdict.classList.toggle("failed", !report.passed);
  verdict.hidden = false;
  const failures = report.findings.filter((finding) => finding.severity === "error");
  document.getElementById("gate").replaceChildren(
    ...report.accuracy.gate.criteria.map(({ passed, sentence }) =>
      element("li", { class: passed ? "" : "failed" }, capital(sentence.replace(/: (passed|failed)$/, ""))),
    ),
    ...failures.map(({ where, sentence }) => element("li", { class: "failed" }, `${where}: ${sentence}`)),
  );
}

function showSizes(sizes) {
  const rows = [
    ["fp16", sizes.fp16],
    ["plain int8", sizes.plain_int8],
    ["plain int4", sizes.plain_int4],
    ["this model", sizes.weights, "ours"],
  ];
  const most = Math.max(...rows.map(([, size]) => size));
  document.getElementById("bars").replaceChildren(
    ...rows.map(([label, size, kind]) => {
      const bar = element("i");
      bar.style.width = `${(100 * size) / most}%`;
      const amount = element("b", { title: `${size.toLocaleString("en")} bytes` }, `${bytes(size)} `);
      amount.append(element("small", {}, percent(size / sizes.fp16, 0)));
      return element("div", { class: `bar ${kind ?? ""}` }, element("span", {}, label), bar, amount);
    }),
  );
  const packed = sizes.transport ? `, ${bytes(sizes.transport)} compressed for transport` : "";
  text("size-note", `The whole folder, tokenizer and report included: ${bytes(sizes.artifact)}${packed}.`);
  document.getElementById("size").hidden = false;
}

function showAccuracy({ total, method, export_exact, export_shipped, evaluation, reference_absent }) {
  const main = total ?? export_shipped;
  const { comparison } = main;
  const against = total ? "against the original" : "against the compressed weights";
  tiles("losses", [
    ["Perplexity", estimate(comparison.candidate_perplexity), `${total ? "original" : "before export"} ${estimate(comparison.reference_perplexity)}`],
    ["Same top token", percent(comparison.top1_agreement.value), against],
    ["KL divergence", number(comparison.divergence.mean.value), "mean, in nats"],
  ]);
  const rows = [
    ["Total", total],
    ["Method", method],
    ["Export, deployed", export_shipped],
    ["Export, float32", export_exact],
  ].filter(([, loss]) => loss);
  const head = ["Loss", "Perplexity", "KL", "Top-1", "NMSE"];
  document.getElementById("loss-table").replaceChildren(
    element("thead", {}, element("tr", {}, ...head.map((cell) => element("th", { scope: "col" }, cell)))),
    element(
      "tbody",
      {},
      ...rows.map(([label, { comparison: found }]) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, label),
          ...[
            `× ${number(found.perplexity_ratio.value, 4)}`,
            number(found.divergence.mean.value, 2),
            percent(found.top1_agreement.value),
            number(found.nmse, 2),
          ].map((cell) => element("td", {}, cell)),
        ),
      ),
    ),
  );
  text(
    "accuracy-note",
    `Measured at export with ${main.candidate.split(",")[0]} on ${evaluation.positions.toLocaleString("en")} positions of ` +
      `${evaluation.source}.${reference_absent ? ` No original: ${reference_absent}` : ""}`,
  );
  document.getElementById("accuracy").hidden = false;
}

/** Fills a list of tiles with [name, value, unit] rows. */
function tiles(id, rows) {
  document.getElementById(id).replaceChildren(
    ...rows.map(([name, value, unit]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value), element("dd", { class: "unit" }, unit)),
    ),
  );
}

function estimate({ value, standard_error: error }) {
  if (value === null) return "–";
  const digits = error > 0 ? Math.max(0, 1 - Math.floor(Math.log10(error))) : 2;
  return error > 0 ? `${value.toFixed(digits)} ± ${error.toFixed(digits)}` : number(value);
}

const capital = (words) => words[0].toUpperCase() + words.slice(1);
const text = (id, words) => (document.getElementById(id).textContent = words);
