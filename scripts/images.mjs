/** Draws the pictures of README and docs into docs/images; `npm run images`. A test compares them byte by byte. */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const { drawings } = await import("../dist/test/cli/drawings.js");
const folder = join(import.meta.dirname, "..", "docs", "images");
mkdirSync(folder, { recursive: true });
for (const [name, svg] of Object.entries(drawings())) writeFileSync(join(folder, name), svg);
