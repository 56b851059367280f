"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const FIRST = 50; // rows of a table that are shown before all are asked for
  const state = { model: 0, weight: 0 };

  const make = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  // numbers as people read them

  const isNumber = (kind) => kind !== "text" && kind !== "code";
  const show = (value, kind) => {
    if (value === null || value === undefined) return "–";
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value !== "number") return String(value);
    const spell = (options) => new Intl.NumberFormat("en", options).format(value);
    if (kind === "whole") return spell({ maximumFractionDigits: 0 });
    if (kind === "seconds") return spell({ maximumFractionDigits: 1, minimumFractionDigits: 1 });
    if (kind === "bytes") return `${new Intl.NumberFormat("en", { maximumSignificantDigits: 4 }).format(value / 1e6)} MB`;
    if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
    return spell({ maximumSignificantDigits: 5 });
  };

  // rows of the model and the weight that are picked

  const made = {
    weights: (model) => model.weights,
    layers: (model) => model.layers,
    bins: (model) => {
      const found = page.histograms[model.histograms[state.weight]];
      if (!found) return [];
      const width = (found.high - found.low) / found.counts.length;
      return found.counts.map((count, place) => [found.low + place * width, found.low + (place + 1) * width, count]);
    },
    levels: (model) => model.levels[state.weight].map(([median, low, high], place) => [place, median, low ?? median, high ?? median]),
  };
  const rowsOf = (table) => table.rows ?? (page.models.length ? made[table.id](page.models[state.model]) : []);

  // tables

  function fill(place, table, rows) {
    const built = make("table");
    const head = built.createTHead().insertRow();
    const body = built.createTBody();
    const sorting = table.sorting ?? (table.sorting = { column: -1, down: false });
    const order = () => {
      const { column, down } = sorting;
      if (column < 0) return rows;
      const empty = (value) => value === null || value === undefined;
      return [...rows].sort((a, b) => {
        const [x, y] = [a[column], b[column]];
        if (empty(x) || empty(y)) return empty(x) - empty(y); // what is missing stands last
        const less = typeof x === "number" && typeof y === "number"
          ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
        return down ? -less : less;
      });
    };
    const cells = (all) => {
      const shown = all ? order() : order().slice(0, FIRST);
      body.replaceChildren(...shown.map((row) => {
        const line = make("tr");
        table.columns.forEach((column, index) => {
          const cell = line.insertCell();
          cell.className = isNumber(column.kind) ? "n" : "t";
          cell.classList.toggle("screen", !column.printed);
          if (column.kind === "code" && row[index]) {
            const lines = String(row[index]);
            const folded = make("details");
            folded.append(make("summary", lines.length > 40 ? `${lines.slice(0, 40)} …` : lines), make("pre", lines));
            cell.append(folded);
          } else {
            cell.textContent = show(row[index], column.kind);
          }
        });
        return line;
      }));
      more.hidden = all || rows.length <= FIRST;
      [...head.cells].forEach((cell, index) => cell.setAttribute(
        "aria-sort", index !== sorting.column ? "none" : sorting.down ? "descending" : "ascending"));
    };
    table.columns.forEach((column, index) => {
      const cell = make("th", null, { scope: "col" });
      const button = make("button", column.title, { type: "button" });
      if (isNumber(column.kind)) cell.className = "n";
      cell.classList.toggle("screen", !column.printed);
      button.addEventListener("click", () => {
        sorting.down = sorting.column === index && !sorting.down;
        sorting.column = index;
        cells(more.hidden);
      });
      cell.append(button);
      head.append(cell);
    });
    const more = make("button", `Show all ${show(rows.length, "whole")} rows`, { type: "button", class: "more" });
    more.addEventListener("click", () => cells(true));
    cells(rows.length <= FIRST);
    place.replaceChildren(built, more);
  }

  // charts

  const axis = {
    labelColor: "var(--fg)", titleColor: "var(--fg)", gridColor: "var(--grid)", domainColor: "var(--muted)",
    tickColor: "var(--muted)", titleFontWeight: "normal", labelLimit: 150, labelFontSize: 11, titleFontSize: 12,
  };
  const config = {
    background: "transparent",
    font: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
    view: { stroke: null },
    axis,
    legend: {
      labelColor: "var(--fg)", titleColor: "var(--fg)", titleFontWeight: "normal", orient: "bottom",
      labelFontSize: 11, titleFontSize: 12, symbolStrokeColor: "var(--fg)", symbolFillColor: "var(--fg)",
      symbolOpacity: 1, layout: { bottom: { anchor: "start", direction: "vertical", margin: 6 } },
    },
    title: { color: "var(--fg)", anchor: "start", fontSize: 13, fontWeight: "normal", offset: 8 },
    range: { category: Array.from({ length: 12 }, (_, place) => `var(--c${place + 1})`) },
  };
  const objects = (table, rows) =>
    rows.map((row) => Object.fromEntries(table.columns.map((column, index) => [column.name, row[index]])));

  async function draw(chart, datasets, title) {
    const place = document.getElementById(chart.id);
    const spec = structuredClone(chart.spec);
    spec.datasets = datasets;
    if (title) spec.title = title;
    if (spec.height.step) {
      const rows = datasets[chart.sources[0]];
      spec.height = spec.height.step * new Set(rows.map((row) => row.layer)).size;
    }
    if (place.clientWidth < 480) narrow(spec);
    chart.drawn?.finalize();
    try {
      chart.drawn = await vegaEmbed(place, spec, {
        actions: false, renderer: "svg", config, mode: "vega-lite",
        logLevel: 1, // errors: points without intervals are worth no warning
      });
      // its own label says less than that of its place
      place.querySelector("svg")?.setAttribute("aria-hidden", "true");
    } catch (error) {
      place.textContent = `This chart could not be drawn: ${error.message}`;
    }
  }

  // on a phone names stand shorter, and legends in fewer columns
  function narrow(spec) {
    const walk = (value) => {
      if (!value || typeof value !== "object") return;
      if (value.legend && value.legend.columns) value.legend.columns = 1;
      Object.values(value).forEach(walk);
    };
    const { datasets, ...rest } = spec;
    walk(rest);
    spec.config = { axis: { labelLimit: 110 }, axisX: { tickCount: 4, labelOverlap: true } };
  }

  // blocks: lists to pick from, charts, tables

  page.blocks.forEach((block, number) => {
    const place = document.getElementById(`block-${number}`);
    const picks = place.querySelector(".picks");
    const chosen = {};
    const choosers = [];
    const find = (table, name) => table.columns.findIndex((column) => column.name === name);

    const filtered = (table, until = Infinity) => {
      let rows = rowsOf(table);
      Object.keys(chosen).slice(0, until).forEach((name) => {
        const index = find(table, name);
        if (index >= 0) rows = rows.filter((row) => row[index] === chosen[name]);
      });
      return rows;
    };

    const offer = (select, names, kept) => {
      select.replaceChildren(...names.map((name) => make("option", name)));
      select.selectedIndex = Math.max(names.indexOf(kept), 0);
      select.names = names; // an option's own value has other blanks
      select.parentElement.hidden = names.length < 2;
    };

    for (const [name, label] of Object.entries(block.picks)) {
      const wrapper = make("label", `${label} `);
      const select = make("select");
      wrapper.append(select);
      picks.append(wrapper);
      choosers.push({ name, select });
      if (name !== "weight") chosen[name] = undefined;
      select.addEventListener("change", () => {
        if (name === "weight") state.weight = select.selectedIndex;
        else chosen[name] = select.names[select.selectedIndex];
        refresh();
      });
    }

    function refresh() {
      choosers.forEach(({ name, select }, index) => {
        if (name === "weight") {
          const names = (page.models[state.model]?.weights ?? []).map((row) => row[0]);
          offer(select, names, names[state.weight]);
          return;
        }
        const table = block.tables.find((one) => find(one, name) >= 0);
        const names = [...new Set(filtered(table, index).map((row) => row[find(table, name)]))];
        offer(select, names, chosen[name]);
        chosen[name] = names[select.selectedIndex];
      });
      picks.setAttribute("data-picked", choosers.map(({ select }) => select.value).join(", "));
      const seen = block.tables.map((table) => filtered(table));
      const lacking = block.needs && !block.tables.some((table, index) => {
        const column = find(table, block.needs);
        return column >= 0 && seen[index].some((row) => typeof row[column] === "number");
      });
      const missing = place.querySelector(".missing");
      missing.hidden = !lacking;
      missing.textContent = lacking ? block.missing : "";
      const content = place.querySelector(".charts");
      content.hidden = Boolean(lacking);
      block.tables.forEach((table, index) => {
        const details = [...place.querySelectorAll("details.numbers")].find((one) => one.dataset.table === table.id);
        details.hidden = Boolean(lacking) || !seen[index].length;
        const build = () => { if (details.open && details.stale) { fill(details.querySelector(".scroll"), table, seen[index]); details.stale = false; } };
        details.stale = true;
        details.ontoggle = build;
        build();
      });
      if (lacking) return Promise.resolve();
      const last = Object.values(chosen).at(-1) ?? "";
      return Promise.all(block.charts.map((chart) => {
        const datasets = {};
        block.tables.forEach((table, index) => {
          if (chart.sources.includes(table.id)) datasets[table.id] = objects(table, seen[index]);
        });
        return draw(chart, datasets, told() || (Object.hasOwn(block.titles, last) ? block.titles[last] : ""));
      }));
    }

    // what a histogram leaves out
    function told() {
      if (!("weight" in block.picks)) return "";
      const found = page.histograms[page.models[state.model]?.histograms[state.weight]];
      const parts = [
        [found?.below, "below"], [found?.above, "above"], [found?.not_finite, "not finite"],
      ].filter(([count]) => count).map(([count, where]) => `${show(count, "whole")} ${where}`);
      return parts.length ? `not drawn: ${parts.join(", ")}` : "";
    }

    block.refresh = refresh;
    block.ofModel = block.tables.some((table) => !table.rows);
  });

  const models = document.getElementById("pick-model");
  if (models) {
    models.append(...page.models.map((model) => make("option", model.label)));
    models.addEventListener("change", () => {
      const name = page.models[state.model].weights[state.weight]?.[0];
      state.model = models.selectedIndex;
      state.weight = Math.max(page.models[state.model].weights.findIndex((row) => row[0] === name), 0);
      page.blocks.filter((block) => block.ofModel).forEach((block) => block.refresh());
    });
  }

  // light and dark

  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remembered = (value) => {
    try {
      if (value) localStorage.setItem("lexibit-theme", value);
      return localStorage.getItem("lexibit-theme");
    } catch { return null; }
  };
  const dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const tell = () => {
    button.setAttribute("aria-pressed", String(dark()));
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Switch to light" : "Switch to dark");
  };
  const before = remembered();
  if (before === "dark" || before === "light") document.documentElement.dataset.theme = before;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    remembered(document.documentElement.dataset.theme);
    tell();
  });
  system.addEventListener("change", tell);
  tell();

  (async () => {
    for (const block of page.blocks) {
      await block.refresh();
      await new Promise((done) => setTimeout(done)); // the page can be read and used in between
    }
    document.documentElement.dataset.drawn = String(Math.round(performance.now()));
  })();
})();
