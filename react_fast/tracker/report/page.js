"use strict";

const format = (value) => {
  if (value === null || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const digits = size < 1e-3 || size >= 1e5 ? size.toExponential(2) : size < 999.5 ? size.toPrecision(3) : size.toFixed(0);
  return (value < 0 ? "−" : "+") + digits;
};

for (const article of document.querySelectorAll("article[data-example]")) {
  const rows = JSON.parse(article.querySelector("script").textContent);
  const chips = [...article.querySelectorAll(".chip")];
  const buttons = chips.filter((chip) => chip.tagName === "BUTTON");
  const name = (chip) => chip.querySelector("span").textContent;
  const totals = chips.map((chip) => (chip.dataset.total === "" ? null : Number(chip.dataset.total)));
  const readout = article.querySelector(".readout");
  const first = readout.innerHTML;
  const ends = article.querySelectorAll(".scale .end");
  let pinned = null;

  // Colours all chips by `scores`; a token without one comes later than the chosen token.
  const paint = (scores) => {
    const top = Math.max(0, ...scores.filter((score) => score !== null).map(Math.abs));
    chips.forEach((chip, place) => {
      const score = scores[place];
      const kind = place >= scores.length ? "later" : score === null ? "none" : score > 0 ? "pos" : score < 0 ? "neg" : "zero";
      chip.classList.remove("pos", "neg", "zero", "none", "later", "chosen", "pinned");
      chip.classList.add(kind);
      chip.style.setProperty("--a", top && score ? (Math.abs(score) / top).toFixed(3) : "0");
      const text = kind === "later" ? "" : format(score);
      chip.querySelector("small").textContent = text;
      chip.title = text ? `${name(chip)}  ${text}` : name(chip);
    });
    ends[0].textContent = format(-top);
    ends[1].textContent = format(top);
  };

  const total = () => {
    paint(totals);
    readout.innerHTML = first;
  };

  const choose = (button) => {
    const row = rows[buttons.indexOf(button)];
    paint(row);
    button.classList.add("chosen");
    if (button === pinned) button.classList.add("pinned");
    const strongest = row
      .map((score, place) => [score, place])
      .filter(([score]) => score)
      .sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]))
      .slice(0, 3)
      .map(([score, place]) => `“${name(chips[place])}” ${format(score)}`);
    const list = strongest.length ? strongest.join(", ") : "no token";
    readout.textContent = `“${name(button)}” is attributed most to: ${list}.` +
      (button === pinned ? " Pinned; press again or Escape for the total." : "");
  };

  const settle = () => (pinned ? choose(pinned) : total());
  const pin = (button) => {
    pinned = pinned === button ? null : button;
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === pinned)));
    settle();
  };

  buttons.forEach((button, i) => {
    // One stop of the Tab key for each example; arrows move inside.
    button.tabIndex = i === 0 ? 0 : -1;
    button.addEventListener("mouseenter", () => choose(button));
    button.addEventListener("mouseleave", settle);
    button.addEventListener("focus", () => choose(button));
    button.addEventListener("blur", settle);
    button.addEventListener("click", () => pin(button));
    button.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: buttons.length - 1 };
      if (event.key === "Escape") {
        pinned = null;
        buttons.forEach((other) => other.setAttribute("aria-pressed", "false"));
        total();
      } else if (event.key in moves && buttons[moves[event.key]]) {
        event.preventDefault();
        button.tabIndex = -1;
        buttons[moves[event.key]].tabIndex = 0;
        buttons[moves[event.key]].focus();
      }
    });
  });

  article.querySelector("input").addEventListener("change", (event) => {
    article.classList.toggle("numbers", event.target.checked);
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
