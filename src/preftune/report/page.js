"use strict";
// Pointing at a chart shows the values of all charts at that step; answers can be put in another order. Without this script
// the page is whole.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const data = JSON.parse(document.getElementById("values").textContent);

  const figure = (value, share) => {
    if (share) return (value * 100).toFixed(1).replace("-", "−") + " %";
    if (value === 0) return "0";
    if (Math.abs(value) >= 999.5) return Math.round(value).toLocaleString("en").replace("-", "−");
    return (Math.abs(value) < 1e-3 ? value.toExponential(2) : value.toPrecision(3)).replace(/^-/, "−");
  };

  // The place of the value nearest to x in a rising list.
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return x - xs[low] <= xs[high] - x ? low : high;
  };

  const make = (svg, name, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    svg.append(made);
    return made;
  };

  const charts = [...document.querySelectorAll("[data-chart]")].filter((card) => card.dataset.chart in data).map((card) => {
    const chart = data[card.dataset.chart], svg = card.querySelector("svg");
    const [left, top, right, floor] = chart.frame;
    const shown = [...card.querySelectorAll(".legend b")];
    return {
      ...chart, svg, shown, last: shown.map((b) => b.textContent),
      px: (x) => left + (x - chart.x[0]) / (chart.x[1] - chart.x[0]) * (right - left),
      py: (y) => floor - (y - chart.y[0]) / (chart.y[1] - chart.y[0]) * (floor - top),
      step: (px) => chart.x[0] + (px - left) / (right - left) * (chart.x[1] - chart.x[0]),
      parts: null,
    };
  });

  const open = (chart) => chart.parts ??= {
    line: make(chart.svg, "path", { class: "cursor" }),
    text: make(chart.svg, "text", { class: "at", y: chart.frame[1] + 4 }),
    dots: chart.lines.map((line) => make(chart.svg, "circle", { class: `dot ink${line.ink}`, r: 3.2 })),
  };

  const show = (step) => {
    for (const chart of charts) {
      const { line, text, dots } = open(chart), x = chart.px(step);
      const late = x > (chart.frame[0] + chart.frame[2]) / 2;
      line.setAttribute("d", `M${x} ${chart.frame[1]}V${chart.frame[3]}`);
      text.textContent = step.toLocaleString("en");
      text.setAttribute("x", x + (late ? -5 : 5));
      text.setAttribute("text-anchor", late ? "end" : "start");
      chart.lines.forEach((values, n) => {
        const at = nearest(values.x, step);
        dots[n].setAttribute("cx", chart.px(values.x[at]));
        dots[n].setAttribute("cy", chart.py(values.y[at]));
        chart.shown[n].textContent = figure(values.y[at], chart.share);
      });
      chart.svg.classList.add("pointed");
    }
  };

  const rest = () => {
    for (const chart of charts) {
      chart.svg.classList.remove("pointed");
      chart.shown.forEach((b, n) => { b.textContent = chart.last[n]; });
    }
  };

  for (const chart of charts) {
    const longest = chart.lines.reduce((a, b) => (b.x.length > a.x.length ? b : a)).x;
    let place = longest.length - 1;
    const go = (to) => { place = Math.max(0, Math.min(longest.length - 1, to)); show(longest[place]); };
    const point = (event) => {
      const box = chart.svg.getBoundingClientRect();
      go(nearest(longest, chart.step((event.clientX - box.left) / box.width * chart.svg.viewBox.baseVal.width)));
    };
    chart.svg.tabIndex = 0;
    chart.svg.addEventListener("pointermove", point);
    chart.svg.addEventListener("pointerdown", point);
    chart.svg.addEventListener("pointerleave", rest);
    chart.svg.addEventListener("focus", () => { if (chart.svg.matches(":focus-visible")) go(place); });
    chart.svg.addEventListener("blur", rest);
    chart.svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: -20, PageUp: 20, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") rest();
      if (by) { event.preventDefault(); go(place + by); }
    });
  }

  const order = document.getElementById("order");
  if (order) {
    const samples = [...document.querySelectorAll(".sample")];
    const by = (key, sign) => (a, b) => sign * (a.dataset[key] - b.dataset[key]);
    const orders = {
      given: by("place", 1), most: by("changed", -1), least: by("changed", 1), longer: by("longer", -1), shorter: by("longer", 1),
    };
    order.parentElement.hidden = false;
    order.addEventListener("change", () => samples[0].parentElement.append(...samples.sort(orders[order.value])));
  }
})();
