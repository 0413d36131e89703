// Puts each live chart in the place of its picture when the reader comes near it. medarch.site.charts bundles this with
// Vega from vl-convert, whose versions of it and of its interpreter (which evaluates no text as code) these are.
import { View, parse } from "/npm/vega@6.2.0/+esm";
import { expressionInterpreter } from "/npm/vega-interpreter@2.0.0/+esm";

const NARROW = 500; // px of room: charts that stand in a row stand under one another

async function start(still) {
  const chart = document.createElement("div");
  const plot = chart.appendChild(document.createElement("div"));
  const inputs = chart.appendChild(document.createElement("div"));
  chart.className = "chart";
  still.before(chart);
  try {
    const spec = JSON.parse(still.nextElementSibling.textContent);
    const fits = spec.autosize?.type === "fit-x"; // into any width
    if (fits) spec.width = plot.clientWidth;
    if (spec.layout && plot.clientWidth < NARROW) spec.layout.columns = 1;
    const view = new View(parse(spec, null, { ast: true }), {
      expr: expressionInterpreter, renderer: "svg", container: plot, bind: inputs,
    });
    await view.runAsync();
    if (fits) new ResizeObserver(() => view.width(plot.clientWidth).runAsync()).observe(plot);
    for (const radios of inputs.querySelectorAll(".vega-bind:has(.vega-bind-radio)")) {
      radios.role = "radiogroup";
      radios.ariaLabel = radios.querySelector(".vega-bind-name").textContent;
    }
    still.remove();
  } catch (error) {
    chart.remove(); // and the picture stays
    throw error;
  }
}

const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    start(target);
  }
}, { rootMargin: "400px" });
for (const data of document.querySelectorAll("script.chart-data")) near.observe(data.previousElementSibling);
