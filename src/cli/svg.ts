/** The few SVG elements that drawings are made of, as strings with stable numbers. */

/** Attribute names and values of an element; undefined leaves the attribute out. */
export type Attributes = Readonly<Record<string, string | number | undefined>>;

/** An element with `content` already in SVG. */
export function element(name: string, attributes: Attributes, content = ""): string {
  const list = Object.entries(attributes)
    .filter(([, value]) => value !== undefined)
    .map(([key, value]) => ` ${key}="${typeof value === "number" ? round(value) : escapeText(String(value))}"`)
    .join("");
  return content === "" ? `<${name}${list}/>` : `<${name}${list}>${content}</${name}>`;
}

/** Text with its baseline at (x, y). */
export function text(x: number, y: number, className: string, content: string): string {
  return element("text", { x, y, class: className }, escapeText(content));
}

/** A rectangle. */
export function rect(x: number, y: number, width: number, height: number, className: string, rx?: number): string {
  return element("rect", { x, y, width, height, rx, class: className });
}

/** A line of straight strokes through `points`. */
export function polyline(points: readonly (readonly [x: number, y: number])[], className: string): string {
  return element("polyline", { points: pointList(points), class: className });
}

/** A filled shape with the corners `points`. */
export function polygon(points: readonly (readonly [x: number, y: number])[], className: string): string {
  return element("polygon", { points: pointList(points), class: className });
}

/** `content` with what SVG would read as markup replaced. */
export function escapeText(content: string): string {
  return content.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
}

function pointList(points: readonly (readonly [number, number])[]): string {
  return points.map(([x, y]) => `${round(x)},${round(y)}`).join(" ");
}

/** A tenth of a pixel is enough, and the same everywhere. */
function round(value: number): string {
  return String(Math.round(value * 10) / 10);
}
