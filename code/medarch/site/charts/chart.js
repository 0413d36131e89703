// Puts each live chart in the place of its picture, when the reader comes near it. Bundled with Vega by medarch.site.charts.
import { View, parse } from "/npm/vega@6.2.0/+esm";
import { expressionInterpreter } from "/npm/vega-interpreter@2.0.0/+esm";

const NARROW = 500; // px: a row of charts becomes a column

async function start(data) {
  const chart = document.createElement("div");
  chart.className = "chart";
  const plot = chart.appendChild(document.createElement("div"));
  const inputs = chart.appendChild(document.createElement("div"));
  const still = data.previousElementSibling;
  still.before(chart);
  const spec = JSON.parse(data.textContent);
  if (spec.layout && plot.clientWidth < NARROW) spec.layout.columns = 1;
  const view = new View(parse(spec, null, { ast: true }), {
    expr: expressionInterpreter, renderer: "svg", hover: true, container: plot, bind: inputs,
  });
  try {
    await view.runAsync();
    still.remove();
  } catch (error) {
    chart.remove(); // the picture stays
    throw error;
  }
}

const watch = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    watch.unobserve(target);
    start(target.parentElement.querySelector(":scope > script.chart-data"));
  }
}, { rootMargin: "600px" });
for (const data of document.querySelectorAll("script.chart-data")) watch.observe(data.previousElementSibling);
