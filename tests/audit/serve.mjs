// A static server for the built site on a free loopback port, compressing as a web host does.
import { createReadStream, readFileSync, existsSync, statSync } from "node:fs";
import http from "node:http";
import path from "node:path";
import zlib from "node:zlib";

const TYPES = {
  ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
  ".json": "application/json", ".svg": "image/svg+xml", ".png": "image/png", ".jpg": "image/jpeg",
  ".woff": "font/woff", ".woff2": "font/woff2", ".ipynb": "application/json", ".md": "text/markdown; charset=utf-8",
  ".txt": "text/plain; charset=utf-8", ".xml": "application/xml",
};
const COMPRESSED = new Set([".html", ".css", ".js", ".json", ".svg", ".md", ".txt", ".xml", ".ipynb"]);

/**
 * Serve `root`; returns { url, close }. A path outside `root` or without a file is a 404. A site built for a folder of
 * its host (MEDARCH_SITE_URL) is found under that folder too, for that is where its 404 page looks for its styles.
 */
export async function serve(root) {
  const base = path.resolve(root);
  const folder = new URL(process.env.MEDARCH_SITE_URL || "http://host/").pathname.replace(/\/*$/, "/");
  const server = http.createServer((request, response) => {
    const asked = decodeURIComponent(new URL(request.url, "http://host").pathname);
    let file = path.join(base, asked);
    if (!existsSync(file) && asked.startsWith(folder)) file = path.join(base, asked.slice(folder.length));
    if (file.startsWith(base) && existsSync(file) && statSync(file).isDirectory()) file = path.join(file, "index.html");
    if (!file.startsWith(base + path.sep) || !existsSync(file) || statSync(file).isDirectory()) {
      response.writeHead(404, { "content-type": "text/plain" }).end("not found");
      return;
    }
    const kind = path.extname(file);
    const headers = { "content-type": TYPES[kind] ?? "application/octet-stream", "cache-control": "max-age=600" };
    if (COMPRESSED.has(kind) && /\bgzip\b/.test(request.headers["accept-encoding"] ?? "")) {
      response.writeHead(200, { ...headers, "content-encoding": "gzip" }).end(zlib.gzipSync(readFileSync(file)));
    } else {
      response.writeHead(200, headers);
      createReadStream(file).pipe(response);
    }
  });
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  return { url: `http://127.0.0.1:${server.address().port}`, close: () => server.close() };
}
