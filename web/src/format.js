// Numbers as text, and elements without markup in strings.

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** Bytes in decimal units, three digits: 1.13 MB. */
export function bytes(count) {
  if (count === null || count === undefined) return "–";
  let power = 0;
  let value = count;
  while (value >= 999.5 && power < UNITS.length - 1) {
    value /= 1000;
    power += 1;
  }
  return `${power ? value.toPrecision(3) : value} ${UNITS[power]}`;
}

/** A number with a few significant digits; very small and very large ones as powers of ten. */
export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(1).replace("e+", "e");
  return size >= 10 ** digits ? Math.round(value).toLocaleString("en") : value.toPrecision(digits);
}

/** A share as a percentage. */
export function percent(share, digits = 1) {
  return share === null || share === undefined ? "–" : `${(100 * share).toFixed(digits)} %`;
}

/** Seconds, or milliseconds below one. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

/** An element with attributes and children; text stays text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
