// Starting Debian's Chromium, the same way for the audit and for the screenshots.
import { existsSync } from "node:fs";
import { chromium } from "playwright-core";

const PLACES = [process.env.CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];

/** Launch a headless Chromium that opens no connection of its own. */
export async function launch(extra = []) {
  const executablePath = PLACES.find((place) => place && existsSync(place));
  if (!executablePath) {
    console.error("audit: no Chromium found: apt-get install chromium, or name it in the variable CHROMIUM");
    process.exit(2);
  }
  const quiet = ["background-networking", "component-update", "sync", "quic", "gpu", "default-apps"];
  return chromium.launch({
    executablePath,
    args: ["--no-sandbox", "--no-first-run", ...quiet.map((name) => `--disable-${name}`), ...extra],
  });
}

/** Wait until the page shows what it will show: mathematics typeset, fonts, pictures and charts there. Returns what did not come, or "". */
export async function settle(page, seconds = 30) {
  return page.evaluate(async (limit) => {
    document.querySelectorAll("img[loading=lazy]").forEach((image) => (image.loading = "eager"));
    const typeset = async () => {
      if (document.querySelector('script[src*="mathjax"]')) {
        while (!window.MathJax?.startup?.promise) await new Promise((done) => setTimeout(done, 20));
        await window.MathJax.startup.promise;
      }
      await document.fonts.ready;
      await Promise.all([...document.images].map((image) => image.decode().catch(() => {})));
      for (const { parentElement: figure } of document.querySelectorAll("script.chart-data")) {
        figure.scrollIntoView(); // a chart comes to life when the reader comes near; one on another slide does not
        while (figure.offsetParent && !figure.querySelector(".chart svg")) await new Promise((done) => setTimeout(done, 20));
      }
      scrollTo(0, 0);
      return "";
    };
    const late = new Promise((done) => setTimeout(done, limit * 1000, `not settled after ${limit} s`));
    return Promise.race([typeset(), late]);
  }, seconds);
}

/** Put the page into the light or the dark theme, as its button does, and let transitions end. */
export async function setTheme(page, theme) {
  await page.evaluate((name) => {
    document.documentElement.dataset.mode = name;
    document.documentElement.dataset.theme = name;
  }, theme);
  await page.addStyleTag({ content: "*, ::before, ::after { transition: none !important; animation: none !important }" });
  await page.waitForTimeout(50);
}
