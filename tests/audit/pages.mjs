// Checks every page of a built site in Chromium: node pages.mjs SITE [--only TEXT] [--no-lighthouse]
// Accessibility in both themes, links and anchors, requests, console, equations, weight, a phone's width, Lighthouse.
// One line a finding: page, rule, what is wrong, what to do. Exit code 1 if there is any, 2 if nothing could be checked.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { availableParallelism } from "node:os";
import { globSync, parseArguments } from "./arguments.mjs";
import { launch, settle, setTheme } from "./browser.mjs";
import { serve } from "./serve.mjs";

const KB = 1000;
const BUDGET = { landing: 300 * KB, page: 520 * KB, charts: 220 * KB }; // compressed, before the figures, and Vega apart
const LIGHTHOUSE = { performance: 0.9, accessibility: 1, "best-practices": 1 };
const DESKTOP = 1500; // Lighthouse's benchmark index of a fast desktop, from which it makes a phone by a factor of four
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const AXE_OPTIONS = {
  runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
  rules: { "label-content-name-mismatch": { enabled: true } }, // a WCAG 2.1 A rule that axe still calls experimental
  resultTypes: ["violations"],
};

const { site, only, lighthouse: wantLighthouse } = parseArguments(process.argv.slice(2));
const findings = [];
const anchors = new Map(); // page -> the ids on it
const links = []; // [page, address without its fragment, fragment]
const report = (page, rule, text, remedy) => findings.push(`${page}: ${rule}: ${text}\n    → ${remedy}`);

/** Load one page once and check it in both themes and on a phone. Returns its weight in bytes. */
async function check(browser, origin, name, landing) {
  const page = await browser.newPage({ viewport: { width: 1280, height: 900 }, colorScheme: "light" });
  page.setDefaultTimeout(60_000);
  const transferred = new Map();
  const session = await page.context().newCDPSession(page);
  await session.send("Network.enable");
  const urls = new Map();
  session.on("Network.requestWillBeSent", ({ requestId, request }) => urls.set(requestId, request.url));
  session.on("Network.loadingFinished", ({ requestId, encodedDataLength }) =>
    transferred.set(urls.get(requestId) ?? requestId, encodedDataLength));
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(origin) && !/^(data|blob|about):/.test(url))
      report(name, "third-party request", url, "serve it from book/_static, or drop it");
  });
  page.on("response", (response) => {
    if (response.status() >= 400)
      report(name, `HTTP ${response.status()}`, response.url(), "the page asks for a file that the site does not have");
  });
  page.on("console", (message) => {
    if (message.type() === "error") report(name, "console error", message.text(), "open the page and its console");
  });
  page.on("pageerror", (error) => report(name, "script error", String(error), "open the page and its console"));

  await page.goto(`${origin}/${name}`, { waitUntil: "networkidle" });
  const late = await settle(page);
  if (late) report(name, "mathematics, fonts or charts", late, "open the page and see what its console and network say");
  const size = (wanted) => [...transferred].filter(([url]) => wanted(url)).reduce((sum, [, n]) => sum + n, 0);
  const isVega = (url) => url.includes("/_static/vega.js"); // fetched for readers who come near a chart
  const weight = size((url) => !url.includes("/_images/") && !isVega(url));
  const budget = landing ? BUDGET.landing : BUDGET.page;
  for (const [found, allowed, what] of [[weight, budget, "a page"], [size(isVega), BUDGET.charts, "Vega"]]) {
    if (found <= allowed) continue;
    const heavy = [...transferred].sort((a, b) => b[1] - a[1]).slice(0, 4);
    const list = heavy.map(([url, n]) => `${url.slice(origin.length + 1)} ${Math.round(n / KB)}`).join(", ");
    report(name, "weight", `${Math.round(found / KB)} KB over the ${allowed / KB} KB that ${what} may weigh compressed`,
      `the heaviest, in KB: ${list}`);
  }
  for (const slider of await page.locator('.chart input[type="range"]').all()) {
    const after = async (key) => {
      await slider.press(key);
      await page.waitForTimeout(100);
      return slider.evaluate((input) => input.closest(".chart").querySelector("svg").outerHTML);
    };
    if ((await after("Home")) === (await after("End")))
      report(name, "chart", `the input ${await slider.getAttribute("name")} changes nothing`,
        "let something in the chart depend on the parameter");
  }

  const found = await page.evaluate(() => ({
    ids: [...document.querySelectorAll("[id], a[name]")].map((element) => element.id || element.name),
    hrefs: [...document.querySelectorAll("a[href]")].map((link) => link.href),
  }));
  anchors.set(name, new Set(found.ids));
  for (const href of found.hrefs.filter((text) => text.startsWith(origin))) {
    const { pathname, hash } = new URL(href);
    links.push([name, decodeURIComponent(pathname), decodeURIComponent(hash.slice(1))]);
  }

  await page.evaluate(() => document.querySelectorAll("details").forEach((fold) => (fold.open = true)));
  await page.evaluate(AXE);
  for (const theme of ["light", "dark"]) {
    await setTheme(page, theme);
    const { violations } = await page.evaluate((options) => axe.run(document, options), AXE_OPTIONS);
    for (const { id, help, helpUrl, nodes } of violations)
      for (const node of nodes.slice(0, 5))
        report(`${name} (${theme})`, `axe ${id}`, `${node.target.join(" ")}: ${help}`,
          `${(node.failureSummary ?? "").split("\n").slice(1).join("; ").trim()} (${helpUrl.split("?")[0]})`);
  }

  const state = await page.evaluate(() => ({
    merror: [...document.querySelectorAll("mjx-merror")].map((error) => error.textContent.trim()),
    math: document.querySelectorAll(".math").length,
    typeset: document.querySelectorAll("mjx-container").length,
    images: [...document.images].filter((image) => image.complete && image.naturalWidth === 0).map((image) => image.src),
    noAlt: [...document.querySelectorAll("article img")].filter((image) => !image.alt.trim()
      && !image.hasAttribute("role")).map((image) => image.src),
    icons: [...document.querySelectorAll('[class*="fa-"]')].filter((icon) =>
      getComputedStyle(icon, "::before").content === "none").map((icon) => icon.className),
  }));
  for (const text of state.merror) report(name, "equation", text, "mend the TeX: MathJax could not set it");
  if (state.math > state.typeset)
    report(name, "equation", `${state.math - state.typeset} of ${state.math} stayed raw TeX`, "see the page's console");
  for (const url of state.images) report(name, "image", `${url} does not show`, "the file is missing or broken");
  for (const url of state.noAlt) report(name, "alt text", url, "say in the alt text what there is to be seen");
  for (const icon of state.icons) report(name, "icon", `"${icon}" shows nothing`, "Font Awesome has no such icon");

  await page.setViewportSize({ width: 390, height: 844 });
  await page.waitForTimeout(100);
  const wide = await page.evaluate(() => {
    if (document.scrollingElement.scrollWidth <= innerWidth) return null;
    const scrolls = (element) => element && element !== document.body
      && (getComputedStyle(element).overflowX !== "visible" || scrolls(element.parentElement));
    const guilty = [...document.querySelectorAll("body *")].filter((element) =>
      element.getBoundingClientRect().right > innerWidth + 1 && !scrolls(element.parentElement));
    const names = guilty.slice(0, 3).map((element) => `${element.tagName.toLowerCase()}.${element.className}`);
    return `${document.scrollingElement.scrollWidth} px wide, by ${names.join(" and ") || "an unknown element"}`;
  });
  if (wide) report(name, "overflow at 390 px", wide, "let it wrap, or scroll inside a container of its own");
  await page.close();
  return weight;
}

/** Every link into the site must have its file, and its anchor an element there. Returns how many links there are. */
async function checkLinks(origin) {
  const exists = new Map();
  for (const [name, address, anchor] of links) {
    if (!exists.has(address)) exists.set(address, (await fetch(origin + address, { method: "HEAD" })).ok);
    const ids = anchors.get(address.slice(1) || first);
    if (!exists.get(address)) report(name, "broken link", address, "mend its address, or build what it points to");
    else if (anchor && ids && !ids.has(anchor))
      report(name, "broken anchor", `${address}#${anchor}`, "no element on that page has this id: mend the label");
  }
  return links.length;
}

/**
 * Lighthouse on its phone profile; a performance short of the mark is measured thrice and the median counts. A phone is
 * this machine slowed down, fourfold where it is as fast as Lighthouse supposes and less where it is slower already.
 */
async function measure(origin, name, port) {
  const { default: lighthouse } = await import("lighthouse");
  const categories = Object.keys(LIGHTHOUSE);
  const run = async (slowdown) => (await lighthouse(`${origin}/${name}`, {
    port, logLevel: "error", output: "json", onlyCategories: categories },
    { extends: "lighthouse:default", settings: { throttling: { cpuSlowdownMultiplier: slowdown } } })).lhr;
  const { benchmarkIndex } = (await run(4)).environment;
  const slowdown = Math.min(4, Math.max(1, (4 * benchmarkIndex) / DESKTOP));
  const runs = [await run(slowdown)];
  if ((runs[0].categories.performance.score ?? 0) < LIGHTHOUSE.performance)
    runs.push(await run(slowdown), await run(slowdown));
  runs.sort((a, b) => a.categories.performance.score - b.categories.performance.score);
  const result = runs[Math.floor(runs.length / 2)];
  const scores = categories.map((key) => `${key} ${result.categories[key].score}`);
  console.log(`lighthouse ${name}: ${scores.join(", ")} (index ${benchmarkIndex}, slowed down ${slowdown.toFixed(1)} times)`);
  for (const key of categories) {
    if ((result.categories[key].score ?? 0) >= LIGHTHOUSE[key]) continue;
    const weak = result.categories[key].auditRefs.map(({ id }) => result.audits[id])
      .filter(({ score }) => score !== null && score < 0.9).map(({ id, displayValue }) => `${id} ${displayValue ?? ""}`);
    report(name, `lighthouse ${key}`, `${result.categories[key].score}, below ${LIGHTHOUSE[key]}`, weak.join("; "));
  }
}

const names = globSync(site).filter((name) => name !== "index.html" && name.includes(only));
if (!names.length) {
  console.error(`audit: no page to check under ${site}${only ? ` with "${only}" in its name` : ""}: run make book first`);
  process.exit(2);
}
const first = readFileSync(`${site}/index.html`, "utf8").match(/url=([^"]+)"/)?.[1] ?? names[0];
const { url: origin, close } = await serve(site);
const port = 20000 + (process.pid % 20000);
const browser = await launch([`--remote-debugging-port=${port}`]);
try {
  const weights = [];
  const waiting = [...names];
  const take = async () => {
    for (let name = waiting.shift(); name; name = waiting.shift()) {
      const weight = await check(browser, origin, name, name === first);
      weights.push([name, weight]);
      console.log(`${name}: ${Math.round(weight / KB)} KB before its figures`);
    }
  };
  await Promise.all(Array.from({ length: Math.min(4, availableParallelism()) }, take));
  console.log(`${await checkLinks(origin)} links into the site followed`);
  if (wantLighthouse) {
    const chapter = weights.filter(([name]) => name !== first).sort((a, b) => b[1] - a[1])[0]?.[0];
    for (const name of new Set([names.includes(first) ? first : names[0], chapter ?? names[0]]))
      await measure(origin, name, port);
  }
} finally {
  await browser.close();
  close();
}
for (const finding of findings) console.error(finding);
console.log(findings.length ? `${findings.length} findings on ${names.length} pages`
  : `${names.length} pages: nothing found`);
process.exit(findings.length ? 1 : 0);
