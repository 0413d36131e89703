// Whatever is wider than its place scrolls inside itself; this lets the keyboard reach it, and only then.
(() => {
  const WIDE = "mjx-container[display], .pst-scrollable-table-container, .cell_output .text_html, div.highlight pre, dt.sig";
  const reach = () => {
    for (const element of document.querySelectorAll(WIDE)) {
      if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
      else element.removeAttribute("tabindex");
    }
  };
  addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    reach();
    addEventListener("resize", reach);
  });
})();
