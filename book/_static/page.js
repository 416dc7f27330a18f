// What a page does by itself: code shown or folded, definitions closed, sweeps, films, answers.

function codeSwitch() {
  const cells = [...document.querySelectorAll("details.hide")];
  const header = document.querySelector(".article-header-buttons");
  if (!cells.length || !header) return;
  const button = document.createElement("button");
  button.className = "code-switch";
  const show = (open) => {
    for (const cell of cells) cell.open = open;
    button.textContent = open ? "Fold code" : "Show code";
    button.setAttribute("aria-pressed", open);
  };
  let open = false;
  try { open = localStorage.getItem("code") === "shown"; } catch { /* a page that keeps nothing */ }
  show(open);
  button.addEventListener("click", () => {
    open = !open;
    show(open);
    try { localStorage.setItem("code", open ? "shown" : "folded"); } catch { /* as above */ }
  });
  header.prepend(button);
}

function definitions() {
  const terms = document.querySelectorAll(".term");
  for (const term of terms) {
    for (const name of ["mouseenter", "focusin"]) {
      term.addEventListener(name, () => {
        term.classList.remove("closed");
        const box = term.querySelector("[role=tooltip]");
        box.style.left = "0";
        const over = box.getBoundingClientRect().right - document.documentElement.clientWidth + 12;
        if (over > 0) box.style.left = `${-over}px`;
      });
    }
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") for (const term of terms) term.classList.add("closed");
  });
}

function sweeps() {
  for (const sweep of document.querySelectorAll(".sweep")) {
    const input = sweep.querySelector("input"), frame = sweep.querySelector(".frame");
    const labels = JSON.parse(sweep.dataset.labels);
    const show = () => {
      const n = Number(input.value);
      frame.style.backgroundPosition = `0 ${(100 * n) / (labels.length - 1)}%`;
      sweep.querySelector("output").textContent = labels[n];
      input.setAttribute("aria-valuetext", labels[n]);
      frame.setAttribute("aria-label", `${sweep.dataset.alt} ${labels[n]}`);
    };
    input.addEventListener("input", show);
    sweep.querySelector("label").hidden = false;
    show();
  }
}

function films() {
  for (const film of document.querySelectorAll("picture.film")) {
    const still = film.querySelector("source"), reduced = still.media;
    const button = document.createElement("button");
    button.className = "code-switch";
    button.textContent = "Pause";
    button.addEventListener("click", () => {
      const paused = still.media === "all";
      still.media = paused ? reduced : "all";
      button.textContent = paused ? "Pause" : "Play";
    });
    if (!matchMedia(reduced).matches) film.after(button);
  }
}

function answers() {
  for (const form of document.querySelectorAll("form.ask")) {
    form.hidden = false;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const { answer, tolerance, shown } = form.dataset;
      let given = form.elements.answer.value.trim();
      if (tolerance !== undefined) given = given.replace(",", ".").replace("−", "-");
      const right = tolerance === undefined
        ? given === answer
        : given !== "" && Math.abs(Number(given) - Number(answer)) <= Number(tolerance);
      const asked = given !== "" && !(tolerance !== undefined && Number.isNaN(Number(given)));
      form.querySelector("output").textContent = !asked
        ? "Give an answer first."
        : right ? `Right: ${shown}.` : "Not on this run. Try again, or open the solution.";
    });
  }
}

document.addEventListener("DOMContentLoaded", () => {
  codeSwitch();
  definitions();
  sweeps();
  films();
  answers();
});
