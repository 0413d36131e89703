// The command line of pages.mjs and the list of a site's pages.
import { readdirSync } from "node:fs";
import path from "node:path";

/** Read `SITE [--only TEXT] [--no-lighthouse]`. */
export function parseArguments(words) {
  const only = words.includes("--only") ? words[words.indexOf("--only") + 1] : "";
  return { site: path.resolve(words[0] ?? "_build/html"), only, lighthouse: !words.includes("--no-lighthouse") };
}

/** All pages under `site`, as paths from it, in order. */
export function globSync(site) {
  return readdirSync(site, { recursive: true }).map(String)
    .filter((name) => name.endsWith(".html") && !name.startsWith("_")).sort();
}
