"use strict";
// The row browser of a page: rows as JSON in #rows, filtered, sorted and shown a page at a time.
(() => {
  const place = document.getElementById("row-browser");
  const {metrics, verdicts, systems, rows} = JSON.parse(document.getElementById("rows").textContent);
  const MOST_CELLS = 2.5e7;  // of the table a comparison of two texts fills; more takes seconds
  const LEAST_ALIKE = 0.4;   // texts with less in common are marked nowhere: all would be

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  // --- what differs ---

  const tokens = (text) => text.match(/[\p{Script=Latin}\p{N}_]+|\s+|[^]/gu) || [];

  // Which tokens of a and of b stand in their longest common subsequence; null where it would take too long.
  function shared(a, b) {
    let start = 0, ends = 0;
    while (start < a.length && start < b.length && a[start] === b[start]) start++;
    while (ends < a.length - start && ends < b.length - start && a.at(-1 - ends) === b.at(-1 - ends)) ends++;
    const n = a.length - start - ends, m = b.length - start - ends;
    if (n * m > MOST_CELLS) return null;
    const inA = new Uint8Array(a.length).fill(1), inB = new Uint8Array(b.length).fill(1);
    inA.fill(0, start, start + n);
    inB.fill(0, start, start + m);
    const wide = m + 1, best = new Uint16Array((n + 1) * wide);
    for (let i = n - 1; i >= 0; i--)
      for (let j = m - 1; j >= 0; j--)
        best[i * wide + j] = a[start + i] === b[start + j]
          ? best[(i + 1) * wide + j + 1] + 1
          : Math.max(best[(i + 1) * wide + j], best[i * wide + j + 1]);
    for (let i = 0, j = 0; i < n && j < m;) {
      if (a[start + i] === b[start + j]) { inA[start + i++] = 1; inB[start + j++] = 1; }
      else if (best[(i + 1) * wide + j] >= best[i * wide + j + 1]) i++;
      else j++;
    }
    return [inA, inB];
  }

  function marked(pieces, known, kind) {
    const box = make("pre");
    for (let at = 0; at < pieces.length;) {
      let end = at;
      while (end < pieces.length && known[end] === known[at]) end++;
      const text = pieces.slice(at, end).join("");
      box.append(known[at] ? text : make("mark", {class: kind}, text));
      at = end;
    }
    return box;
  }

  const length = (pieces) => pieces.reduce((sum, piece) => sum + piece.length, 0);
  const common = (pieces, known) => length(pieces.filter((_, at) => known[at]));

  // Reference and answer with what the other lacks marked, and a word on it.
  function compared(reference, answer) {
    const a = tokens(reference), b = tokens(answer), found = shared(a, b);
    const plain = [make("pre", {}, reference), make("pre", {}, answer)];
    if (!found) return [...plain, "too long to mark what differs"];
    if (reference === answer) return [...plain, "the same text"];
    const alike = 2 * common(a, found[0]) / Math.max(1, reference.length + answer.length);
    if (alike < LEAST_ALIKE) return [...plain, "too little in common to mark what differs"];
    return [marked(a, found[0], "gone"), marked(b, found[1], "new"), ""];
  }

  // --- one row ---

  function shown(value) {
    if (value === null || value === undefined) return "–";
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (Number.isInteger(value) || Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
    return Math.abs(value) < 1 ? value.toFixed(3) : value.toPrecision(3);
  }

  const pill = (text, tone = "") => make("span", {class: `pill ${tone}`}, text);
  const block = (title, content, wide, word = "") => make("div", {class: wide ? "wide" : ""},
    make("h3", {}, title, word && make("span", {}, ` · ${word}`)), content);

  function figures(row) {
    const who = ["base", "student", "teacher"].filter((name) => row[name]);
    const head = make("tr", {}, make("th", {}, "metric"), ...who.map((name) => make("th", {class: "number"}, name)));
    const lines = metrics.map((metric, at) => make("tr", {}, make("td", {}, metric.label),
      ...who.map((name) => make("td", {class: "number"}, shown(row[name][at])))));
    return make("div", {class: "scroll"},
      make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines)));
  }

  function content(row) {
    const parts = [];
    if (row.problem) parts.push(make("p", {class: "problem"}, row.problem));
    if (row.output === undefined) {
      parts.push(make("p", {class: "soft"}, "The texts of this row are not at hand."));
    } else {
      const [reference, output, word] = compared(row.reference, row.output);
      const blocks = [block("reference (teacher)", reference, false), block("student", output, false, word)];
      if (row.base_output !== undefined) {
        const [, base, said] = compared(row.reference, row.base_output);
        blocks.push(block("base", base, true, said));
      }
      const prompt = row.prompt.map(([role, text]) =>
        block(`prompt · ${role}`, make("pre", {}, typeof text === "number" ? systems[text] : text), true));
      parts.push(make("div", {class: "texts"}, ...blocks, ...prompt));
    }
    parts.push(make("details", {}, make("summary", {}, make("span", {class: "soft"}, "every metric of this row")),
      figures(row)));
    const about = [`row ${row.order.toLocaleString("en")}`, row.province, row.split].filter(Boolean).join(" · ");
    parts.push(make("p", {class: "soft"}, `${about} · `, make("code", {}, row.id)));
    return parts;
  }

  function item(row, key) {
    const values = [["char_f1", "character F1"]];
    if (key && key !== "char_f1") values.push([key, metrics.find((metric) => metric.key === key).label]);
    const said = values.map(([name, label]) => {
      const at = metrics.findIndex((metric) => metric.key === name);
      return at < 0 ? "" : ` · ${label} ${shown(row.student[at])}`;
    }).join("");
    const tags = row.why.length ? row.why.map((why) => pill(why, "warn"))
      : row.verdicts.includes("exact") ? [pill("exact", "good")] : [];
    if (row.verdicts.includes("worse than base")) tags.unshift(pill("worse than base", "bad"));
    const box = make("details", {class: "row"},
      make("summary", {}, make("b", {}, row.spot || row.id), " ",
        make("span", {class: "soft"}, row.type + said), ...tags));
    box.addEventListener("toggle", () => { if (box.open && box.children.length === 1) box.append(...content(row)); });
    return box;
  }

  // --- which rows ---

  const haystacks = new Map();
  function haystack(row) {
    if (!haystacks.has(row)) {
      const prompt = (row.prompt || []).map(([, text]) => typeof text === "number" ? "" : text);
      haystacks.set(row, [row.id, row.spot, row.problem, ...row.why, ...prompt, row.reference, row.output,
        row.base_output].filter(Boolean).join("\n").toLowerCase());
    }
    return haystacks.get(row);
  }

  const at = (key) => metrics.findIndex((metric) => metric.key === key);
  const sorts = [
    {name: "most wrong", value: (row) => -row.bad, words: ["most first", "least first"], bad: true},
    {name: "order of evaluation", value: (row) => row.order, words: ["first to last", "last to first"]},
  ];
  if (rows.some((row) => row.gain !== undefined))
    sorts.push({name: "gain over base", value: (row) => row.gain, words: ["lost most first", "won most first"]});
  for (const {key, label, small} of metrics) {
    const sign = small ? -1 : 1, words = ["worst first", "best first"];
    const neutral = ["tokens_per_s", "prompt_tokens", "output_tokens", "length_ratio"].includes(key);
    sorts.push({name: label, key, value: (row) => {
      const value = row.student[at(key)];
      return value === null || value === undefined ? undefined : sign * value;
    }, words: neutral ? ["low to high", "high to low"] : words});
  }

  const counted = (values) => {
    const counts = new Map();
    for (const value of values) if (value) counts.set(value, (counts.get(value) || 0) + 1);
    return counts;
  };

  const state = {query: "", type: "", province: "", split: "", verdicts: new Set(), sort: 0, turned: false, first: 0, size: 10};

  function chosen() {
    const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) =>
      ["type", "province", "split"].every((name) => !state[name] || row[name] === state[name])
      && [...state.verdicts].every((name) => row.verdicts.includes(name))
      && words.every((word) => haystack(row).includes(word)));
    const {value, bad} = sorts[state.sort], sign = state.turned ? -1 : 1;
    const wrong = (row) => row.why.length ? 0 : 1;
    return found.sort((one, other) => {
      const a = value(one), b = value(other);
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);  // unknown goes last
      return sign * ((bad ? wrong(one) - wrong(other) : 0) || a - b || one.order - other.order);
    });
  }

  // --- the controls ---

  const list = make("div", {class: "rows"});
  const count = make("p", {class: "soft", role: "status", "aria-live": "polite"});
  const turn = make("button", {type: "button", onclick: () => { state.turned = !state.turned; show(); }});
  const back = make("button", {type: "button", onclick: () => go(-state.size)}, "← earlier");
  const on = make("button", {type: "button", onclick: () => go(state.size)}, "later →");

  function go(by) {
    state.first += by;
    show(false);
    place.scrollIntoView({block: "start"});
  }

  function show(anew = true) {
    const found = chosen();
    if (anew) state.first = 0;
    const last = Math.min(state.first + state.size, found.length);
    list.replaceChildren(...found.slice(state.first, last).map((row) => item(row, sorts[state.sort].key)));
    const of = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    count.textContent = found.length > state.size ? `${of}, ${state.first + 1} to ${last} shown` : of;
    turn.textContent = sorts[state.sort].words[state.turned ? 1 : 0];
    back.disabled = state.first === 0;
    on.disabled = last >= found.length;
    back.parentElement.hidden = found.length <= Math.min(state.size, 10);
  }

  function choice(label, name, options, chosen = (value) => { state[name] = value; }) {
    const select = make("select", {onchange: () => { chosen(select.value); show(); }},
      ...options.map(([value, text]) => make("option", {value}, text)));
    return make("label", {"data-filter": name}, make("span", {}, label), make("span", {class: "choice"}, select));
  }

  function filter(label, name) {
    const counts = counted(rows.map((row) => row[name]));
    if (counts.size < 2) return [];
    const options = [...counts].sort((one, other) => other[1] - one[1]).map(([value, n]) => [value, `${value} (${n.toLocaleString("en")})`]);
    return [choice(label, name, [["", "all"], ...options])];
  }

  let waiting = 0;
  const search = make("input", {type: "search", placeholder: "spot, id, reason or text", oninput: () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.query = search.value; show(); }, 150);
  }});

  const verdictCounts = counted(rows.flatMap((row) => row.verdicts));

  function verdictButton(name) {
    const n = verdictCounts.get(name);
    const button = make("button", {type: "button", class: "pill", "aria-pressed": "false", "data-verdict": name, onclick: () => {
      if (!state.verdicts.delete(name)) state.verdicts.add(name);
      button.setAttribute("aria-pressed", state.verdicts.has(name));
      show();
    }}, `${name} ${n.toLocaleString("en")}`);
    return button;
  }

  const sorting = choice("sort by", "sort", sorts.map(({name}, n) => [n, name]),
    (value) => { state.sort = Number(value); state.turned = false; });
  sorting.lastElementChild.append(turn);
  const size = choice("rows a page", "size", [10, 25, 100].map((n) => [n, n]), (value) => { state.size = Number(value); });

  place.append(
    make("div", {class: "controls"},
      make("label", {class: "search"}, make("span", {}, "search"), search),
      ...filter("type", "type"), ...filter("province", "province"), ...filter("split", "split"),
      sorting,
      rows.length > 10 ? size : ""),
    make("div", {class: "verdicts", role: "group", "aria-label": "verdicts"},
      ...verdicts.filter((name) => verdictCounts.has(name)).map(verdictButton)),
    count, list, make("div", {class: "pages"}, back, on));
  show();
})();
