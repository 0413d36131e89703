// Fetches Vega (live.js, bundled by medarch.site.charts) when the reader comes near the first chart, and not before.
(() => {
  const bundle = document.currentScript.src.replace(/chart\.js.*/, "vega.js?KEY");
  const near = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    near.disconnect();
    document.head.append(Object.assign(document.createElement("script"), { src: bundle }));
  }, { rootMargin: "400px" });
  for (const data of document.querySelectorAll("script.chart-data")) near.observe(data.previousElementSibling);
})();
