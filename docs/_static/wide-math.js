// A formula wider than the screen scrolls: let the keyboard reach it, too.
async function reachWideMath() {
  await window.MathJax?.startup?.promise;
  for (const math of document.querySelectorAll("div.math mjx-container")) {
    math.tabIndex = math.scrollWidth > math.clientWidth ? 0 : -1;
  }
}
window.addEventListener("load", reachWideMath);
window.addEventListener("resize", reachWideMath);
