// The page of results: filters, charts and the gallery. Everything in the data is text for it, never markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { sides, classes, bands, sample } = data;
  const PAGE = 24; // images at once
  const MATCH = 0.5; // intersection over union from which two boxes of one class are the same object
  const DETAIL = 1400; // pixels of an image's longer side where it is shown large
  const SMALLEST = 256; // the same of a card; smaller thumbnails are enlarged, so that lines are thin
  const MASK_SIDE = 1024; // more of a mask than a card or a screen shows is not painted
  const element = (id) => document.getElementById(id);
  const whole = new Intl.NumberFormat("en");
  const phone = () => window.innerWidth <= 640;

  // ---------------------------------------------------------------- texts and elements

  function make(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function number(value, digits = 0) {
    if (value === null || value === undefined) return "–";
    return value.toLocaleString("en", { maximumFractionDigits: digits });
  }

  function table(columns, rows) {
    const head = make(
      "tr",
      {},
      ...columns.map(([name, kind]) => make("th", { className: kind ?? "", textContent: name })),
    );
    const body = rows.map((row) =>
      make(
        "tr",
        {},
        ...row.map((cell, column) => make("td", { className: columns[column][1] ?? "" }, ...[cell].flat())),
      ),
    );
    return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
  }

  function options(select, pairs) {
    select.replaceChildren(...pairs.map(([value, text]) => make("option", { value, textContent: text })));
  }

  function color(index, alpha = 1) {
    return `hsl(${(index * 137.508) % 360} 85% 58% / ${alpha})`; // the golden angle: no two hues come together
  }

  // ---------------------------------------------------------------- state: the controls are all of it

  const control = Object.fromEntries(
    ["class", "min-score", "max-score", "show", "order", "left", "right", "search"].map((id) => [id, element(id)]),
  );
  let page = 0;
  let shown = []; // the images that the filters leave, in order
  let opened = -1; // which of them is shown large
  let only = null; // the one prediction that is drawn there

  function filter() {
    const value = (id, otherwise) => (control[id].value === "" ? otherwise : Number(control[id].value));
    return {
      class: value("class", -1),
      min: value("min-score", 0),
      max: value("max-score", 1),
      show: control.show.value,
      order: control.order.value,
      left: value("left", 0),
      right: value("right", -1),
      search: control.search.value.toLowerCase(),
    };
  }

  function views(state) {
    return state.right < 0 ? [state.left] : [state.left, state.right];
  }

  // A prediction is [class, score, box or null, mask or null, keypoints or null]; a box [x1, y1, x2, y2].
  function visible(predictions, state) {
    return predictions.filter(
      ([index, score]) => score >= state.min && score <= state.max && (state.class < 0 || index === state.class),
    );
  }

  // Of a classification the best class is what it says; the others are for the large view.
  function counted(predictions) {
    return predictions.filter((prediction, place) => prediction[2] || place === 0);
  }

  function found(item, side, state) {
    const row = item.rows[side];
    return row ? visible(counted(row.predictions), state) : [];
  }

  function certainty(item, state) {
    const scores = views(state).flatMap((side) => found(item, side, state).map((prediction) => prediction[1]));
    return scores.length ? Math.min(...scores) : 2;
  }

  // ---------------------------------------------------------------- what one side finds and the other does not

  function overlap(a, b) {
    const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
    const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
    if (width <= 0 || height <= 0) return 0;
    const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
    return (width * height) / (area(a) + area(b) - width * height);
  }

  // The predictions of each list without a partner in the other: one of its class that lies where it does.
  function alone(left, right) {
    const unmatched = new Set(right);
    const lonely = left.filter((prediction) => {
      let best = null;
      let most = MATCH;
      for (const other of unmatched) {
        if (other[0] !== prediction[0]) continue;
        const share =
          prediction[2] && other[2] ? overlap(prediction[2], other[2]) : Number(!prediction[2] && !other[2]);
        if (share >= most) [best, most] = [other, share];
      }
      return !best || !unmatched.delete(best);
    });
    return [lonely, [...unmatched]];
  }

  function differences(item, state) {
    if (state.right < 0 || !item.rows[state.left] || !item.rows[state.right]) return [[], []];
    return alone(found(item, state.left, state), found(item, state.right, state));
  }

  function differs(item, state) {
    if (differences(item, state).some((list) => list.length)) return true;
    const [left, right] = [item.rows[state.left], item.rows[state.right]];
    return Boolean(left) !== Boolean(right) || Boolean(left?.error) !== Boolean(right?.error);
  }

  // ---------------------------------------------------------------- drawing

  // COCO's run-length code: each number in groups of five bits, the lowest first; from the fourth on, the difference to
  // the number before the last. Runs go down the columns, and the first is of the background.
  function runs(counts) {
    const lengths = [];
    let value = 0;
    let shift = 0;
    for (const character of counts) {
      const bits = character.charCodeAt(0) - 48;
      value += (bits & 31) * 2 ** shift;
      shift += 5;
      if (bits & 32) continue;
      if (bits & 16) value -= 2 ** shift;
      if (lengths.length > 2) value += lengths[lengths.length - 2];
      lengths.push(value);
      value = shift = 0;
    }
    return lengths;
  }

  function paintMask(mask, index) {
    const [height, width] = mask.size;
    const step = Math.ceil(Math.max(height, width) / MASK_SIDE);
    const canvas = make("canvas", { width: Math.ceil(width / step), height: Math.ceil(height / step) });
    const context = canvas.getContext("2d");
    context.fillStyle = color(index);
    context.fillRect(0, 0, 1, 1);
    const [red, green, blue] = context.getImageData(0, 0, 1, 1).data;
    const pixels = context.createImageData(canvas.width, canvas.height);
    let start = 0;
    runs(mask.counts).forEach((length, number) => {
      const end = Math.min(start + length, height * width);
      for (let at = start; number % 2 && at < end;) {
        const column = Math.floor(at / height);
        const last = Math.min(end, (column + 1) * height);
        if (column % step === 0) {
          const first = at - column * height;
          for (let row = Math.ceil(first / step) * step; row < last - column * height; row += step) {
            pixels.data.set([red, green, blue, 115], 4 * ((row / step) * canvas.width + column / step));
          }
        }
        at = last;
      }
      start = end;
    });
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  // A caption on a box, in it or below it: where it covers none of those in `taken`. Where it would, there is none.
  function caption(context, [index, score], [x, top, bottom], size, taken) {
    const text = `${classes[index]} ${score.toFixed(2)}`;
    context.font = `600 ${size}px system-ui, "DejaVu Sans", sans-serif`;
    const [width, height] = [context.measureText(text).width + size * 0.6, size * 1.35];
    const left = Math.max(0, Math.min(x, context.canvas.width - width));
    const places = [top - height, top, bottom].map((y) => Math.max(0, Math.min(y, context.canvas.height - height)));
    const y = places.find(
      (place) => !taken.some((other) => overlap([left, place, left + width, place + height], other)),
    );
    if (y === undefined) return;
    taken.push([left, y, left + width, y + height]);
    context.fillStyle = color(index);
    context.fillRect(left, y, width, height);
    context.fillStyle = "#10141b";
    context.textBaseline = "middle";
    context.fillText(text, left + size * 0.3, y + size * 0.7);
  }

  // Draw an image with some of its predictions; those in `faint` were found by the other side too.
  function draw(canvas, image, row, predictions, faint, longest) {
    const enlarged = longest / Math.max(image.width, image.height);
    const scale = enlarged > 1 ? Math.max(1, image.width < 100 ? Math.floor(enlarged) : enlarged) : 1;
    canvas.width = Math.round(image.width * scale);
    canvas.height = Math.round(image.height * scale);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = image.width >= 100;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = true;
    const [across, down] = [canvas.width / row.width, canvas.height / row.height];
    const size = Math.max(11, Math.round(Math.max(canvas.width, canvas.height) / (longest === DETAIL ? 45 : 22)));
    const ordered = [...predictions].reverse(); // the most probable on top
    for (const [index, , , mask] of ordered) {
      if (mask) context.drawImage(paintMask(mask, index), 0, 0, canvas.width, canvas.height);
    }
    for (const prediction of ordered) {
      const [index, , box, , points] = prediction;
      if (!box) continue;
      const weak = faint.has(prediction);
      const [x, y] = [box[0] * across, box[1] * down];
      context.strokeStyle = color(index, weak ? 0.8 : 1);
      context.lineWidth = Math.max(weak ? 1 : 2, size / (weak ? 10 : 6));
      context.setLineDash(weak ? [size / 3, size / 3] : []);
      context.strokeRect(x, y, (box[2] - box[0]) * across, (box[3] - box[1]) * down);
      context.setLineDash([]);
      for (let at = 0; points && at < points.length; at += 3) {
        if (points[at + 2] < data.shown_score) continue;
        context.beginPath();
        context.arc(points[at] * across, points[at + 1] * down, Math.max(2, size / 4), 0, 2 * Math.PI);
        context.fillStyle = color(index);
        context.fill();
      }
    }
    const [taken, named] = [[], new Set()];
    for (const prediction of counted(predictions)) {
      const [x, top, , bottom] = prediction[2] ?? [0, 0, 0, 0];
      if (prediction[2] && (faint.has(prediction) || named.has(prediction[0]))) continue;
      if (longest !== DETAIL) named.add(prediction[0]); // a card has no place for more than one caption of a class
      caption(context, prediction, [x * across, top * down, bottom * down], size, taken);
    }
  }

  const images = new Map();

  function picture(item) {
    if (!images.has(item)) {
      const image = new Image();
      image.src = item.thumbnail;
      images.set(
        item,
        image.decode().then(() => image),
      );
    }
    return images.get(item);
  }

  function show(place, item, side, state, longest) {
    const row = item.rows[side];
    if (!row || row.error || !item.thumbnail) {
      const text = !row ? "not in these results" : row.error || item.missing;
      place.append(make("div", { className: row?.error ? "none error" : "none", textContent: text }));
      return;
    }
    const canvas = make("canvas", { width: 4, height: 3 });
    canvas.setAttribute("role", "img");
    const predictions = only ? [only] : found(item, side, state);
    canvas.setAttribute("aria-label", `${item.path}: ${sentence(predictions)}`);
    place.append(canvas);
    const own = new Set(differences(item, state).flat());
    const faint = new Set(state.right < 0 ? [] : predictions.filter((prediction) => !own.has(prediction)));
    picture(item).then((image) => {
      draw(canvas, image, row, predictions, faint, longest);
      canvas.dataset.drawn = "true";
    });
  }

  function sentence(predictions) {
    const counts = new Map();
    for (const [index] of predictions) counts.set(index, (counts.get(index) ?? 0) + 1);
    const parts = [...counts].map(([index, count]) => (count > 1 ? `${count} × ${classes[index]}` : classes[index]));
    return parts.join(", ") || "nothing";
  }

  // ---------------------------------------------------------------- gallery

  function passes(item, state) {
    if (!item.path.toLowerCase().includes(state.search)) return false;
    const rows = views(state)
      .map((side) => item.rows[side])
      .filter(Boolean);
    if (!rows.length) return false;
    const failed = rows.some((row) => row.error);
    const count = views(state).reduce((sum, side) => sum + found(item, side, state).length, 0);
    const isNarrow = state.class >= 0 || state.min > data.shown_score || state.max < 1;
    if (state.show === "errors") return failed;
    if (state.show === "nothing") return !failed && count === 0;
    if (state.show === "differs") return differs(item, state);
    if (state.show === "found" || isNarrow) return count > 0;
    return true;
  }

  function sorted(list, state) {
    const by = {
      least: (item) => certainty(item, state),
      most: (item) => -certainty(item, state),
      many: (item) => -views(state).reduce((sum, side) => sum + found(item, side, state).length, 0),
    }[state.order];
    const keys = new Map(by ? list.map((item) => [item, by(item)]) : []);
    return [...list].sort((a, b) => (by && keys.get(a) - keys.get(b)) || (a.path < b.path ? -1 : 1));
  }

  function card(item, place, state) {
    const pictures = make("div", { className: "pictures" });
    for (const side of views(state)) show(pictures, item, side, state, phone() ? SMALLEST : 1.5 * SMALLEST);
    const about = make(
      "div",
      { className: "about" },
      make("div", { className: "name", textContent: item.path.split("/").pop(), title: item.path }),
    );
    const lines = views(state).map((side) => item.rows[side]?.error ?? sentence(found(item, side, state)));
    const [left, right] = differences(item, state);
    about.append(make("div", { className: "found", textContent: lines[0], title: lines.join("\n") }));
    if (left.length || right.length) {
      about.append(
        make("div", { className: "alone", textContent: `only left: ${left.length} · only right: ${right.length}` }),
      );
    }
    const button = make("button", { type: "button", className: "card" }, pictures, about);
    button.addEventListener("click", () => open(place));
    return button;
  }

  function update() {
    const state = filter();
    shown = sorted(
      sample.items.filter((item) => passes(item, state)),
      state,
    );
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.max(0, Math.min(page, pages - 1));
    element("count").textContent = `${whole.format(shown.length)} of ${whole.format(sample.items.length)} images`;
    if (state.right >= 0) {
      const both = shown.map((item) => differences(item, state));
      const sum = (side) => both.reduce((total, lists) => total + lists[side].length, 0);
      element("count").textContent += ` · only left: ${whole.format(sum(0))} · only right: ${whole.format(sum(1))}`;
    }
    element("page").textContent = `${page + 1} / ${pages}`;
    element("previous").disabled = page === 0;
    element("next").disabled = page === pages - 1;
    const start = page * PAGE;
    const cards = shown.slice(start, start + PAGE).map((item, place) => card(item, start + place, state));
    element("cards").className = state.right < 0 ? "" : "pairs";
    element("cards").replaceChildren(...cards);
    if (!cards.length)
      element("cards").append(make("p", { className: "muted", textContent: "No image in the sample is like this." }));
    chart();
  }

  function turn(by) {
    const before = page;
    page += by;
    update();
    if (page !== before) element("gallery").scrollIntoView({ block: "start" });
  }

  // ---------------------------------------------------------------- one image, large

  function open(place) {
    opened = place;
    only = null;
    detail();
    if (!element("detail").open) element("detail").showModal();
  }

  function detail() {
    const state = filter();
    const item = shown[opened];
    element("position").textContent = `${opened + 1} / ${shown.length}`;
    element("path").textContent = element("path").title = item.path;
    element("before").disabled = opened === 0;
    element("after").disabled = opened === shown.length - 1;
    const own = new Set(differences(item, state).flat());
    element("views").replaceChildren(
      ...views(state).map((side) => {
        const place = make("div", { className: "picture" });
        const row = item.rows[side];
        const list = make(
          "div",
          { className: "list" },
          make("h3", { textContent: sides.length > 1 ? sides[side].name : "Predictions" }),
        );
        show(place, item, side, state, DETAIL);
        if (row?.error) list.append(make("p", { className: "error", textContent: row.error }));
        for (const prediction of visible(row?.predictions ?? [], state)) {
          const [index, score] = prediction;
          const dot = make("i");
          dot.style.background = color(index);
          const line = make(
            "button",
            { type: "button", className: prediction === only ? "prediction only" : "prediction" },
            dot,
            make("span", { textContent: classes[index] }),
            make("b", { textContent: score.toFixed(3) }),
          );
          if (state.right >= 0 && own.has(prediction))
            line.lastChild.before(make("span", { className: "alone", textContent: "only here" }));
          line.addEventListener("click", () => {
            only = only === prediction ? null : prediction;
            detail();
          });
          list.append(line);
        }
        if (row?.left_out)
          list.append(
            make("p", {
              className: "muted",
              textContent: `${row.left_out} predictions or masks more are in the table`,
            }),
          );
        return make("div", { className: "view" }, place, list);
      }),
    );
  }

  function move(by) {
    const place = opened + by;
    if (place < 0 || place >= shown.length) return;
    page = Math.floor(place / PAGE);
    open(place);
  }

  // ---------------------------------------------------------------- charts

  const mounted = {};

  function chartConfig() {
    const style = getComputedStyle(document.body);
    const value = (name) => style.getPropertyValue(name).trim();
    const axis = {
      labelColor: value("--muted"),
      titleColor: value("--muted"),
      gridColor: value("--line"),
      domainColor: value("--line"),
      tickColor: value("--line"),
    };
    return {
      background: null,
      font: style.fontFamily,
      view: { stroke: null },
      axis: { ...axis, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelLimit: 150 },
      legend: {
        labelColor: value("--text"),
        titleColor: value("--muted"),
        labelLimit: 300,
        orient: "top",
        title: null,
      },
      range: { category: [value("--accent"), value("--other")] },
      bar: { color: value("--accent") },
    };
  }

  // Draw a chart, or where its library is missing a table of its rows.
  async function mount(id, spec, rows, columns) {
    const place = element(id);
    if (!window.vegaEmbed) {
      place.replaceChildren(
        table(
          columns.map(([name, , kind]) => [name, kind]),
          rows.map((row) => columns.map(([, cell]) => String(cell(row)))),
        ),
      );
      return null;
    }
    // The interpreter: the library would make programs of expressions otherwise, which the page's policy forbids.
    const embedded = await window.vegaEmbed(
      place,
      { ...spec, data: { values: rows }, width: "container" },
      { actions: false, renderer: "svg", ast: true, config: chartConfig() },
    );
    mounted[id]?.finalize();
    mounted[id] = embedded;
    return embedded.view;
  }

  // Counts of a side: [class, predictions in each band of scores].
  function total(counts, state) {
    return counts.reduce(
      (sum, count, band) =>
        (band + 1) / bands > state.min + 1e-9 && band / bands < state.max - 1e-9 ? sum + count : sum,
      0,
    );
  }

  function classRows(state) {
    const rows = views(state).flatMap((side) =>
      sides[side].counts.map(([index, counts]) => ({
        class: classes[index],
        index,
        side: sides[side].name,
        count: total(counts, state),
        chosen: state.class < 0 || state.class === index,
      })),
    );
    const sums = new Map();
    for (const row of rows) sums.set(row.index, (sums.get(row.index) ?? 0) + row.count);
    const most = [...sums]
      .filter(([index, count]) => count || index === state.class)
      .sort((a, b) => b[1] - a[1])
      .slice(0, 40)
      .map(([index]) => index);
    return rows.filter((row) => most.includes(row.index)).map((row) => ({ ...row, rank: most.indexOf(row.index) }));
  }

  function scoreRows(state) {
    return views(state).flatMap((side) =>
      Array.from({ length: bands }, (_, band) => ({
        from: band / bands,
        to: (band + 1) / bands,
        side: sides[side].name,
        count: sides[side].counts.reduce(
          (sum, [index, counts]) => (state.class < 0 || index === state.class ? sum + counts[band] : sum),
          0,
        ),
        chosen: (band + 1) / bands > state.min + 1e-9 && band / bands < state.max - 1e-9,
      })),
    );
  }

  let drawn = ""; // which state the charts show: they are drawn anew only for another
  let last = Promise.resolve();

  function chart() {
    const state = filter();
    const key = JSON.stringify([
      state.class,
      state.min,
      state.max,
      views(state),
      getComputedStyle(document.body).color,
    ]);
    if (key === drawn) return;
    drawn = key;
    last = last.then(() => drawCharts(state)); // one at a time: each takes the place of the one before
  }

  async function drawCharts(state) {
    const isPair = state.right >= 0 && state.right !== state.left;
    const opacity = { condition: { test: { field: "chosen", equal: true }, value: 1 }, value: 0.25 };
    const side = isPair ? { color: { field: "side", sort: null } } : {};
    const rows = classRows(state);
    const byClass = await mount(
      "class-chart",
      {
        height: new Set(rows.map((row) => row.index)).size * (isPair ? 26 : 20),
        mark: { type: "bar", cornerRadiusEnd: 3, tooltip: { content: "encoding" }, cursor: "pointer" },
        encoding: {
          y: { field: "class", type: "nominal", sort: { field: "rank" }, axis: { title: null } },
          x: {
            field: "count",
            type: "quantitative",
            title: "predictions",
            axis: { title: null, format: ",d", tickCount: 4, orient: "top" },
          },
          ...(isPair ? { yOffset: { field: "side", sort: null } } : {}),
          ...side,
          opacity,
        },
      },
      rows,
      [
        ["class", (row) => row.class],
        ["side", (row) => row.side],
        ["predictions", (row) => whole.format(row.count), "number"],
      ],
    );
    byClass?.addEventListener("click", (_, item) => {
      if (item?.datum?.index === undefined) return;
      control.class.value = control.class.value === String(item.datum.index) ? "" : String(item.datum.index);
      changed();
    });
    const byScore = await mount(
      "score-chart",
      {
        height: 220,
        params: [{ name: "range", select: { type: "interval", encodings: ["x"] } }],
        mark: { type: "bar", tooltip: { content: "encoding" }, ...(isPair ? { opacity: 0.6 } : {}) },
        encoding: {
          x: {
            field: "from",
            type: "quantitative",
            bin: { binned: true, step: 1 / bands },
            title: "score",
            scale: { domain: [0, 1] },
            axis: { values: [0, 0.2, 0.4, 0.6, 0.8, 1], format: ".1f" },
          },
          x2: { field: "to" },
          y: {
            field: "count",
            type: "quantitative",
            stack: false,
            title: "predictions",
            axis: { format: ",d", tickCount: 5 },
          },
          ...side,
          ...(isPair ? {} : { opacity }),
        },
      },
      scoreRows(state),
      [
        ["from", (row) => row.from.toFixed(2)],
        ["side", (row) => row.side],
        ["predictions", (row) => whole.format(row.count), "number"],
      ],
    );
    let range = null;
    byScore?.addSignalListener("range", (_, value) => {
      range = Object.values(value)[0] ?? null;
    });
    element("score-chart").onpointerup = () =>
      setTimeout(() => {
        // once the chart knows of it too
        if (!range) return;
        const [low, high] = [...range].sort((a, b) => a - b).map((at) => Math.round(at * bands) / bands);
        if (high > low) setScores(Math.max(0, low), Math.min(1, high));
      });
    document.body.dataset.charts = drawn;
  }

  function setScores(low, high) {
    control["min-score"].value = low;
    control["max-score"].value = high;
    changed();
  }

  function drawSpeed() {
    if (data.stages.length) {
      mount(
        "stage-chart",
        {
          height: 26 * data.stages.length,
          mark: { type: "bar", cornerRadiusEnd: 3, tooltip: { content: "encoding" } },
          encoding: {
            y: { field: "stage", type: "nominal", sort: null, title: null },
            x: { field: "seconds", type: "quantitative", title: "seconds" },
          },
        },
        data.stages,
        [
          ["stage", (row) => row.stage],
          ["seconds", (row) => number(row.seconds, 2), "number"],
        ],
      );
    }
    if (data.tasks.rows.length) {
      const workers = new Set(data.tasks.rows.map((row) => row.worker)).size;
      mount(
        "task-chart",
        {
          height: workers * Math.max(6, Math.min(26, 400 / workers)),
          mark: {
            type: "bar",
            tooltip: { content: "data" },
            stroke: getComputedStyle(document.documentElement).getPropertyValue("--surface"),
            strokeWidth: 1,
          },
          encoding: {
            y: { field: "worker", type: "nominal", title: null, axis: workers > 40 ? null : {} },
            x: { field: "begin", type: "quantitative", title: "seconds since the pass began" },
            x2: { field: "end" },
            color: {
              field: "failed",
              title: null,
              legend: null,
              scale: {
                domain: [false, true],
                range: ["--accent", "--bad"].map((name) =>
                  getComputedStyle(document.documentElement).getPropertyValue(name),
                ),
              },
            },
          },
        },
        data.tasks.rows,
        [
          ["worker", (row) => row.worker],
          ["begin", (row) => number(row.begin, 2), "number"],
          ["end", (row) => number(row.end, 2), "number"],
          ["images", (row) => row.images, "number"],
        ],
      );
    }
  }

  // ---------------------------------------------------------------- what does not change

  function write() {
    element("title").textContent = document.title = data.title;
    element("subtitle").textContent = data.subtitle;
    element("footer").textContent = data.footer;
    element("counted").textContent = data.counted;
    element("sampled").textContent = sample.text;
    element("run").textContent = data.run_text;
    element("summary").append(
      ...data.tiles.map(([name, value, kind]) =>
        make(
          "div",
          { className: `tile ${kind ?? ""}` },
          make("b", { textContent: typeof value === "number" ? number(value, 2) : (value ?? "–") }),
          name,
        ),
      ),
    );
    const errors = data.errors.map((error) => [
      error.reason,
      ...(sides.length > 1 ? [sides[error.side].name] : []),
      whole.format(error.count),
      error.examples.flatMap((path) => [make("code", { textContent: path }), make("br")]),
    ]);
    element("error-table").append(
      errors.length
        ? table([["reason"], ...(sides.length > 1 ? [["side"]] : []), ["images", "number"], ["examples"]], errors)
        : make("p", { className: "muted", textContent: "No image failed." }),
    );
    element("task-caption").textContent = data.tasks.text;
    element("run-table").append(
      data.runs.length
        ? table(
            data.run_columns,
            data.runs.map((row) => row.map((cell) => (typeof cell === "number" ? number(cell, 2) : (cell ?? "–")))),
          )
        : make("p", { className: "muted", textContent: "No records of runs are left." }),
    );
    element("setting-table").append(
      data.settings.length
        ? table(
            [["setting"], ["value"]],
            data.settings.map(([name, value]) => [
              make("code", { textContent: name }),
              make("code", { textContent: value }),
            ]),
          )
        : make("p", { className: "muted", textContent: "No records of runs are left." }),
    );
    const used = new Set(sides.flatMap((side) => side.counts.map(([index]) => index)));
    const names = [...used]
      .sort((a, b) => classes[a].localeCompare(classes[b]))
      .map((index) => [index, classes[index]]);
    options(control.class, [["", "all"], ...names]);
    options(control.show, [
      ["all", "all"],
      ["found", "with predictions"],
      ["nothing", "without predictions"],
      ["errors", "errors"],
      ...(sides.length > 1 ? [["differs", "what differs"]] : []),
    ]);
    options(control.order, [
      ["least", "least certain"],
      ["most", "most certain"],
      ["many", "most predictions"],
      ["path", "path"],
    ]);
    options(
      control.left,
      sides.map((side, index) => [index, side.name]),
    );
    options(control.right, [["", "none"], ...sides.map((side, index) => [index, side.name])]);
    for (const label of document.querySelectorAll(".sides")) label.hidden = sides.length < 2;
    element("classes").hidden = !used.size;
    for (const id of ["stage-chart", "task-chart"]) element(id).parentElement.hidden = !data.tasks.rows.length;
  }

  // Scores of detections below it are too improbable to look at; the best class of an image may have any.
  function lowestScore() {
    control["min-score"].value = views(filter()).some((side) => sides[side].boxed) ? data.shown_score : 0;
  }

  function reset() {
    control.class.value = control.search.value = "";
    control["max-score"].value = 1;
    control.show.value = "all";
    control.order.value = "least";
    control.left.value = data.pair ? data.pair[0] : 0;
    control.right.value = data.pair ? data.pair[1] : "";
    lowestScore();
    page = 0;
  }

  function changed() {
    page = 0;
    update();
  }

  write();
  reset();
  update();
  drawSpeed();
  for (const [id, place] of Object.entries(control)) {
    // A field that is left has changed nothing more: a card that is clicked then must stay the same.
    place.addEventListener(place.tagName === "SELECT" ? "change" : "input", () => {
      if (id === "left" || id === "right") lowestScore();
      changed();
    });
  }
  element("filters").addEventListener("submit", (event) => event.preventDefault());
  element("filters").addEventListener("reset", (event) => {
    event.preventDefault();
    reset();
    update();
  });
  element("previous").addEventListener("click", () => turn(-1));
  element("next").addEventListener("click", () => turn(1));
  element("before").addEventListener("click", () => move(-1));
  element("after").addEventListener("click", () => move(1));
  element("close").addEventListener("click", () => element("detail").close());
  element("detail").addEventListener(
    "click",
    (event) => event.target === element("detail") && element("detail").close(),
  );
  element("detail").addEventListener("close", () => {
    only = null;
    update();
    document.querySelectorAll(".card")[opened - page * PAGE]?.focus();
  });
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.ctrlKey || event.altKey || event.metaKey || ["INPUT", "SELECT"].includes(event.target.tagName))
      return;
    event.preventDefault();
    if (element("detail").open) move(by);
    else turn(by);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    chart();
    drawSpeed();
  });
})();
