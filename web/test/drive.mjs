// Opens the page in a headless Chromium, does what it is told, and prints what came of it as JSON.
//
//   node drive.mjs '{"url": "http://127.0.0.1:8377/", "chromium": "/usr/bin/chromium", "steps": [...]}'
//
// Steps: {"generate": prompt, "tokens": n, "temperature": t, "stopAfter": seconds}, {"screenshot": path},
// {"size": [width, height]} and {"wait": seconds}. What was generated comes back in order, as "results".
// Options: "arguments" of Chromium, "script" to run before the page's own, "size", "scheme" (light, dark), "touch" (a
// phone), "until" (the state that ends loading, "ready" unless given), "raw" (another page: only its text).
import { chromium } from "playwright-core";

const PATIENCE = 60_000; // milliseconds; the machine may be busy

const plan = JSON.parse(process.argv[2]);
const browser = await chromium.launch({
  executablePath: plan.chromium,
  // Containers lack the privileges that the sandbox needs, and a large /dev/shm.
  args: ["--no-sandbox", "--disable-dev-shm-usage", ...(plan.arguments ?? [])],
});
try {
  const context = await browser.newContext({
    viewport: size(plan.size ?? [1280, 900]),
    colorScheme: plan.scheme ?? "light",
    deviceScaleFactor: plan.touch ? 2 : 1,
    isMobile: Boolean(plan.touch),
    hasTouch: Boolean(plan.touch),
  });
  const page = await context.newPage();
  if (plan.script) await page.addInitScript(plan.script);
  const messages = [];
  const requests = [];
  page.on("console", (message) => messages.push(`${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => messages.push(`pageerror: ${error.message}`));
  context.on("request", (request) => requests.push(request.url()));

  await page.goto(plan.url);
  try {
    await inState(page, plan.until ?? "ready");
  } catch (error) {
    throw new Error([error.message, ...messages, ...requests].join("\n"));
  }
  const results = [];
  for (const step of plan.steps ?? []) {
    if (step.screenshot) await page.screenshot({ path: step.screenshot, fullPage: true });
    else if (step.size) await page.setViewportSize(size(step.size));
    else if (step.wait) await page.waitForTimeout(step.wait * 1000);
    else if (!(await broken(page))) results.push(await generate(page, step));
  }
  if (plan.raw) console.log(JSON.stringify({ messages, requests, body: await page.locator("body").textContent() }));
  else await show(page, { results, messages, requests });
} finally {
  await browser.close();
}

/** Prints what was collected, and what stands on the page. */
async function show(page, collected) {
  const shown = (id) => page.locator(`#${id}`).innerText();
  const alert = page.locator("#alert");
  console.log(
    JSON.stringify({
      ...collected,
      alert: (await alert.isVisible()) ? await alert.innerText() : null,
      verdict: await shown("verdict"),
      facts: await shown("facts"),
      download: `${await shown("download")} ${await shown("download-unit")}`,
      heap: `${await shown("heap")} ${await shown("heap-unit")}`,
      isolated: await page.evaluate(() => self.crossOriginIsolated),
    }),
  );
}

function size([width, height]) {
  return { width, height };
}

async function inState(page, name) {
  await page.locator(`body[data-state="${name}"], body[data-state="broken"]`).waitFor({ timeout: PATIENCE });
}

/** Whether the page has said that nothing can be generated. */
async function broken(page) {
  return (await page.locator("body").getAttribute("data-state")) === "broken";
}

async function generate(page, { generate: prompt, tokens = 32, temperature = 0, stopAfter = null }) {
  await page.fill("#prompt", prompt);
  await page.fill("#tokens", String(tokens));
  await page.fill("#temperature", String(temperature));
  await page.click("#generate");
  let streamed = 0;
  if (stopAfter !== null) {
    await page.waitForTimeout(stopAfter * 1000);
    streamed = (await page.locator("#added").textContent()).length;
    await page.click("#stop");
  }
  await inState(page, "ready");
  if (await broken(page)) return null;
  const text = (id) => page.locator(`#${id}`).textContent();
  const alert = page.locator("#alert");
  return {
    alert: (await alert.isVisible()) ? await alert.textContent() : null,
    overhang: await page.evaluate(() => document.documentElement.scrollWidth - innerWidth),
    ids: JSON.parse((await page.locator("#text").getAttribute("data-ids")) ?? "[]"),
    text: await text("added"),
    given: await text("given"),
    note: await text("note"),
    speed: await text("speed"),
    firstToken: await text("first-token"),
    streamed,
  };
}
