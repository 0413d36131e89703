// Pictures of pages as readers see them: node screenshots.mjs SITE FOLDER PAGE [PAGE ...]
// Each page (a path such as book/index.html) on a desktop and on a phone, light and dark, from the top. `--full`: whole pages.
import { mkdirSync } from "node:fs";
import path from "node:path";
import { launch, setTheme, settle } from "./browser.mjs";
import { serve } from "./serve.mjs";

const words = process.argv.slice(2).filter((word) => word !== "--full");
const fullPage = process.argv.includes("--full");
const [site, folder, ...names] = words;
if (!names.length) {
  console.error("usage: node screenshots.mjs SITE FOLDER PAGE [PAGE ...] [--full]");
  process.exit(2);
}
mkdirSync(folder, { recursive: true });
const { url, close } = await serve(site);
const browser = await launch();
for (const name of names) {
  for (const [device, width, height, scale] of [["desktop", 1280, 900, 1], ["phone", 390, 844, 2]]) {
    const page = await browser.newPage({ viewport: { width, height }, deviceScaleFactor: scale });
    await page.goto(`${url}/${name}`, { waitUntil: "networkidle" });
    await settle(page);
    for (const theme of ["light", "dark"]) {
      await setTheme(page, theme);
      const file = path.join(folder, `${name.replaceAll("/", "-").replace(/\.html$/, "")}-${device}-${theme}.png`);
      await page.screenshot({ path: file, fullPage });
      console.log(file);
    }
    await page.close();
  }
}
await browser.close();
close();
