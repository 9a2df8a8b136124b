(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const [form, cards, status, pages, tabs, sound] = ["filters", "cards", "status", "pages", "tabs", "sound"].map(at);
  const PAGE = 10;
  const TABS = { all: "All queries", worst: "Worst first", hubs: "Hubs" };
  const RANKS = [["any", 0, Infinity], ["1", 0, 1], ["2–5", 1, 5], ["6–10", 5, 10], ["over 10", 10, Infinity]];
  const state = { tab: "all", page: 0 };

  const { make, noun, wording, words, picture, pictures, stop } = gallery({ cards, status, sound });

  const chosen = (name) => form.elements[name] ? form.elements[name].value : "0";
  const list = () => data.lists[Number(chosen("list"))];
  const direction = () => list().directions[Number(chosen("direction"))];
  const entry = (modality, row) => list().rows[modality][row];
  const itemOf = (modality, row) => data.items[entry(modality, row)[0]];

  const show = (node, modality, row) => {
    const [number, caption] = entry(modality, row);
    const item = data.items[number];
    if (modality in pictures) node.append(picture(modality, item));
    node.append(words(wording(item, caption)));
    return item;
  };
  const tile = (modality, row, place, score, className) => {
    const node = make("li", "tile" + className);
    const line = make("div", "place");
    line.append(make("span", "", place));
    if (score !== undefined) line.append(make("span", "", (score / 100).toFixed(2)));
    node.append(line);
    show(node, modality, row);
    return node;
  };
  const asked = (modality, row, heading) => {
    const node = make("div", "asked");
    node.append(make("div", "kind", heading + ": " + noun(modality)));
    const missing = show(node, modality, row).missing;
    if (missing.length) node.append(make("div", "kind", "this clip has no " + missing.map(noun).join(", no ")));
    return node;
  };
  const column = (modality) => make("ol", modality in pictures ? "found" : "found lines");

  const queryCard = (way, [query, rank, tied, bits, found, scores, right, rightScore]) => {
    const node = make("article", "card");
    const left = asked(way.query, query, "query");
    const verdict = make("div", rank === 1 ? "verdict first" : "verdict");
    verdict.append("right answer at ", make("b", "", "rank " + rank), " of " + way.size);
    if (tied) verdict.append(" (expected, tied with " + tied + ")");
    left.append(verdict);
    const tiles = column(way.gallery);
    found.forEach((row, index) => {
      const good = bits >> index & 1;
      tiles.append(tile(way.gallery, row, (index + 1) + (good ? " ✓ right" : ""), scores[index], good ? " right" : ""));
    });
    if (right !== undefined) tiles.append(tile(way.gallery, right, "✓ rank " + rank, rightScore, " later"));
    node.append(left, tiles);
    return node;
  };
  const hubCard = (way, [row, count, queries, bits]) => {
    const node = make("article", "card");
    const left = asked(way.gallery, row, "hub");
    const verdict = make("div", "verdict");
    const share = 100 * count / way.asked;
    verdict.append("among the first " + data.k + " of ", make("b", "", count + " queries"),
      " (" + share.toFixed(share < 10 ? 1 : 0) + " %); evenly spread, each would be in " +
      (way.asked * Math.min(1, data.k / way.size)).toFixed(1));
    left.append(verdict);
    const tiles = column(way.query);
    queries.forEach((query, index) => {
      const good = bits >> index & 1;
      tiles.append(tile(way.query, query, good ? "✓ rightly found by" : "found by", undefined, good ? " right" : ""));
    });
    node.append(left, tiles);
    return node;
  };

  // The text that the search looks through, of each item once.
  const searched = new Map();
  const textOf = (item) => {
    if (!searched.has(item)) {
      searched.set(item, [item.key, ...Object.values(item.captions)].join("\n").toLocaleLowerCase());
    }
    return searched.get(item);
  };
  const matching = (way) => {
    const wanted = form.elements.search.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const says = (modality, row) => {
      const text = wanted.length ? textOf(itemOf(modality, row)) : "";
      return wanted.every((word) => text.includes(word));
    };
    if (state.tab === "hubs") return way.hubs.filter((hub) => says(way.gallery, hub[0]));
    const order = state.tab === "worst" ? way.queries : way.shuffled.map((place) => way.queries[place]);
    const [, above, upto] = RANKS[Number(chosen("rank"))];
    return order.filter((query) => query[1] > above && query[1] <= upto && says(way.query, query[0]));
  };

  const draw = () => {
    stop();
    const way = direction();
    const found = matching(way);
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    state.page = Math.min(state.page, last);
    const first = state.page * PAGE;
    const shown = found.slice(first, first + PAGE);
    const hubs = state.tab === "hubs";
    const total = hubs ? way.hubs.length : way.queries.length;
    const drawn = way.queries.length < way.asked && !hubs
      ? " (of " + way.asked + ": half the worst, half drawn at random)" : "";
    const what = hubs ? "answers found most often" : "queries" + (state.tab === "worst" ? ", worst first" : ", in random order");
    status.textContent = found.length
      ? (first + 1) + "–" + (first + shown.length) + " of " + found.length +
        (found.length < total ? " that match, of " + total : "") + " " + what + drawn + "."
      : "None of " + total + " " + (hubs ? "hubs" : "queries") + " match.";
    cards.className = !hubs && shown.some((query) => query.length > 6) ? "six" : "";
    cards.replaceChildren(...shown.map((each) => (hubs ? hubCard : queryCard)(way, each)));
    pages.hidden = last === 0;
    pages.querySelector("span").textContent = "page " + (state.page + 1) + " of " + (last + 1);
    pages.querySelector("[name=previous]").disabled = state.page === 0;
    pages.querySelector("[name=next]").disabled = state.page === last;
    form.querySelector("fieldset.ranks").hidden = hubs;
  };
  const redraw = () => { state.page = 0; draw(); };

  const group = (name, legend, className, options) => {
    const field = make("fieldset", className);
    field.append(make("legend", "", legend));
    options.forEach((text, index) => {
      const label = make("label");
      const input = make("input");
      input.type = "radio";
      input.name = name;
      input.value = String(index);
      input.checked = index === 0;
      label.append(input, make("span", "", text));
      field.append(label);
    });
    return field;
  };
  const fillDirections = () => {
    const options = list().directions.map((way) => way.query + " → " + way.gallery);
    const field = group("direction", "Direction", "directions", options);
    const old = form.querySelector("fieldset.directions");
    if (old) old.replaceWith(field);
    else form.append(field);
  };

  const choose = (name, focus) => {
    state.tab = name;
    for (const tab of tabs.children) {
      const on = tab.dataset.tab === name;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      if (on && focus) tab.focus();
    }
    at("panel").setAttribute("aria-labelledby", "tab-" + name);
    redraw();
  };
  for (const [name, text] of Object.entries(TABS)) {
    const tab = make("button", "", text);
    tab.type = "button";
    tab.id = "tab-" + name;
    tab.dataset.tab = name;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", "panel");
    tabs.append(tab);
  }
  tabs.addEventListener("click", (event) => { if (event.target.dataset.tab) choose(event.target.dataset.tab); });
  tabs.addEventListener("keydown", (event) => {
    const names = Object.keys(TABS);
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -names.length, End: names.length }[event.key];
    if (!step) return;
    const place = names.indexOf(state.tab) + step;
    const wrapped = Math.abs(step) > 1 ? Math.max(0, Math.min(names.length - 1, place)) : (place + names.length) % names.length;
    event.preventDefault();
    choose(names[wrapped], true);
  });

  const search = make("label", "search");
  const box = make("input");
  box.type = "search";
  box.name = "search";
  box.dir = "auto";
  box.placeholder = "words of a caption";
  box.autocomplete = "off";
  search.append(make("span", "", "Search"), box);
  form.append(search);
  if (data.lists.length > 1) form.append(group("list", "List", "lists", data.lists.map((each) => each.title)));
  fillDirections();
  form.append(group("rank", "Right answer at rank", "ranks", RANKS.map(([text]) => text)));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.name === "list") fillDirections();
    redraw();
  });

  const turn = (step) => {
    state.page += step;
    draw();
    tabs.scrollIntoView({ block: "start" });
  };
  for (const [name, text, step] of [["previous", "Previous", -1], ["next", "Next", 1]]) {
    const button = make("button", "", text);
    button.type = "button";
    button.name = name;
    button.addEventListener("click", () => turn(step));
    pages.append(button);
    if (step < 0) pages.append(make("span"));
  }

  const items = Object.values(data.items);
  const without = (kinds) => items.filter((item) => (item.left || []).some((kind) => kinds.includes(kind))).length;
  const [noStill, noMedia] = [without(["poster", "waveform"]), without(["clip", "sound"])];
  if (noMedia || noStill) {
    const { gallery, clip, sound: heard } = data.limits;
    at("budget").textContent = "This gallery is kept below " + gallery / 2 ** 20 + " MiB, each clip below " +
      clip / 1024 + " KiB, each sound below " + heard / 1024 + " KiB: of " + items.length + " items " + noMedia +
      " found no room for a clip or a sound, " + noStill + " none for a picture.";
  }
  choose("all");
})();
