"use strict";

const format = (value) => {
  if (value === null || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const digits = size < 1e-3 || size >= 1e5 ? size.toExponential(2) : size < 999.5 ? size.toPrecision(3) : size.toFixed(0);
  return (value < 0 ? "−" : "+") + digits;
};

const interval = (low, high) => (low === null || high === null ? "" : ` [${format(low)}, ${format(high)}]`);

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);

const place = (event) => {
  const width = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, width - tip.offsetWidth - 8))}px`;
  const below = event.clientY + 18;
  const fits = below + tip.offsetHeight < window.innerHeight;
  tip.style.top = `${fits ? below : event.clientY - tip.offsetHeight - 12}px`;
};

for (const article of document.querySelectorAll("article[data-example]")) {
  const script = article.querySelector("script");
  if (!script) continue;
  const { totals, rows, effects } = JSON.parse(script.textContent);
  const map = article.querySelector(".map");
  const chips = [...map.querySelectorAll(".chip")];
  const order = new Map(chips.map((chip, i) => [chip, i]));
  const start = chips.length - rows.length;
  const readout = article.querySelector(".readout");
  const first = readout.innerHTML;
  const ends = article.querySelectorAll(".scale .end");
  const name = (i) => chips[i].textContent;
  // The effect of the shortest action that holds a token.
  const measured = new Array(chips.length);
  effects.forEach((effect) => {
    for (let i = effect[0]; i < effect[1] && i < chips.length; i++) {
      if (!measured[i] || effect[1] - effect[0] < measured[i][1] - measured[i][0]) measured[i] = effect;
    }
  });
  let shown = totals, chosen = null, numbers = false;

  // Colours all chips by `scores`; a token without one comes later than the chosen token.
  const paint = (scores) => {
    shown = scores;
    const top = scores.reduce((most, score) => Math.max(most, Math.abs(score ?? 0)), 0);
    chips.forEach((chip, i) => {
      const score = scores[i];
      const kind = i >= scores.length ? "later" : score === null ? "none" : score > 0 ? "pos" : score < 0 ? "neg" : "zero";
      chip.className = `chip ${kind}${i === chosen ? " chosen" : ""}`;
      chip.style.setProperty("--a", top && score ? (Math.abs(score) / top).toFixed(3) : "0");
      if (numbers) chip.dataset.number = i < scores.length ? format(score) : "";
    });
    ends[0].textContent = format(-top);
    ends[1].textContent = format(top);
  };

  const choose = (i) => {
    if (chosen !== null) chips[chosen].setAttribute("aria-pressed", "false");
    chosen = i === chosen ? null : i;
    if (chosen === null) {
      readout.innerHTML = first;
      paint(totals);
      return;
    }
    chips[i].setAttribute("aria-pressed", "true");
    const row = rows[i - start];
    paint(row);
    const strongest = row
      .map((score, j) => [score, j])
      .filter(([score]) => score)
      .sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]))
      .slice(0, 3)
      .map(([score, j]) => `“${name(j)}” ${format(score)}`);
    readout.textContent = `“${name(i)}” is attributed most to: ${strongest.length ? strongest.join(", ") : "no token"}. ` +
      "Press it again or Escape for the total.";
  };

  const describe = (i) => {
    const lines = [`“${name(i)}”  place ${i}`];
    if (i < shown.length) lines.push(`attribution ${format(shown[i])}${chosen === null ? "" : ` of “${name(chosen)}”`}`);
    const effect = measured[i];
    if (effect) {
      const [begin, end, mean, low, high, sampled, significant] = effect;
      const where = end - begin > 1 ? ` of places ${begin} to ${end - 1}` : "";
      lines.push(`effect ${format(mean)}${sampled ? interval(low, high) : ", not sampled"}${significant ? " ★" : ""}${where}`);
    }
    return lines.join("\n");
  };

  const at = (event) => order.get(event.target.closest?.(".chip"));
  map.addEventListener("pointerover", (event) => {
    const i = at(event);
    tip.hidden = i === undefined;
    if (i === undefined) return;
    tip.textContent = describe(i);
    place(event);
  });
  map.addEventListener("pointermove", (event) => tip.hidden || place(event));
  map.addEventListener("pointerleave", () => (tip.hidden = true));
  map.addEventListener("click", (event) => {
    const i = at(event);
    if (i !== undefined && rows.length && i >= start) choose(i);
  });
  map.addEventListener("focusin", (event) => {
    const i = at(event);
    if (i !== undefined && chosen === null) readout.textContent = describe(i).replaceAll("\n", "; ");
  });

  if (rows.length) {
    chips.slice(start).forEach((chip) => chip.setAttribute("aria-pressed", "false"));
    // One stop of the Tab key for each example; arrows move inside.
    let stop = start;
    chips[stop].tabIndex = 0;
    map.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: stop + 1, ArrowLeft: stop - 1, Home: start, End: chips.length - 1 };
      if (event.key === "Escape" && chosen !== null) choose(chosen);
      else if (event.key === "Enter" || event.key === " ") choose(stop);
      else if (moves[event.key] >= start && moves[event.key] < chips.length) {
        chips[stop].removeAttribute("tabindex");
        stop = moves[event.key];
        chips[stop].tabIndex = 0;
        chips[stop].focus();
      } else return;
      event.preventDefault();
    });
  }

  article.querySelector(".overview")?.addEventListener("click", (event) => {
    const chip = chips[event.target.dataset.place];
    if (!chip) return;
    chip.scrollIntoView({ block: "center" });
    chip.classList.add("found");
    setTimeout(() => chip.classList.remove("found"), 2000);
  });

  article.querySelector("input").addEventListener("change", (event) => {
    numbers = event.target.checked;
    article.classList.toggle("numbers", numbers);
    paint(shown);
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const upward = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", upward ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.key;
      const numeric = head.dataset.kind !== "text";
      const compare = (a, b) => {
        const [left, right] = [key(a), key(b)];
        if (!numeric) return left.localeCompare(right);
        return Number(left) - Number(right);
      };
      // Rows without a number stay at the end either way.
      const missing = (row) => numeric && Number.isNaN(Number(key(row)));
      const rows = [...table.tBodies[0].rows];
      const known = rows.filter((row) => !missing(row)).sort(compare);
      if (!upward) known.reverse();
      table.tBodies[0].append(...known, ...rows.filter(missing));
    });
  });
}
