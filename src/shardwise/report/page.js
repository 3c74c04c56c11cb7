"use strict";
// Figures are drawn when they come near the screen, in the colours of the page, and again when those change.
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 600px)");
const touch = window.matchMedia("(pointer: coarse)");

function laidOut(figure) {
  const style = getComputedStyle(document.documentElement);
  const [text, line, card] = ["--text", "--line", "--card"].map((name) => style.getPropertyValue(name).trim());
  const layout = structuredClone(figure.layout);
  Object.assign(layout, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    font: { color: text, size: narrow.matches ? 11 : 12 },
    hoverlabel: { bgcolor: card, bordercolor: line, font: { color: text }, align: "left" },
    margin: { l: 44, r: layout.yaxis2 ? 50 : 12, t: 8, b: 40 },
    showlegend: false, // a legend of our own, which takes the room it needs
    dragmode: touch.matches ? false : "zoom",
  });
  for (const name of ["xaxis", "yaxis", "yaxis2"]) {
    if (layout[name]) Object.assign(layout[name], { gridcolor: line, zerolinecolor: line, linecolor: line });
  }
  return layout;
}

function draw(element) {
  const figure = figures[element.dataset.figure];
  Plotly.react(element, figure.data, laidOut(figure), { responsive: true, displaylogo: false, displayModeBar: false });
  if (element.dataset.drawn !== element.dataset.figure) {
    element.dataset.drawn = element.dataset.figure;
    explain(element, figure);
  }
}

// One button per trace below the figure: what its colour means; a click hides or shows it.
function explain(element, figure) {
  const legend = document.createElement("div");
  legend.className = "legend";
  figure.data.forEach((trace, index) => {
    if (trace.showlegend === false) return;
    const button = document.createElement("button");
    const colour = (trace.marker || trace.line).color;
    button.type = "button";
    button.innerHTML = `<i style="background:${colour}"></i>`;
    button.append(trace.name);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      Plotly.restyle(element, { visible: shown }, [index]);
    });
    legend.append(button);
  });
  if (element.nextElementSibling?.className === "legend") element.nextElementSibling.remove();
  element.after(legend);
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "600px" });
const plots = [...document.querySelectorAll(".plot")];
plots.forEach((element) => near.observe(element));
const again = () => plots.filter((element) => element.dataset.drawn).forEach(draw);
dark.addEventListener("change", again);
narrow.addEventListener("change", again);
for (const select of document.querySelectorAll("select[data-for]")) {
  select.addEventListener("change", () => {
    const element = document.getElementById(select.dataset.for);
    element.dataset.figure = select.value;
    draw(element);
  });
}
