
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  const cards = document.getElementById("cards");
  const status = document.getElementById("status");
  const kinds = { random: "drawn at random", worst: "that went worst", best: "that went best" };
  const pictures = { video: "poster", audio: "waveform" };
  const nouns = { video: "video", audio: "sound", text: "caption" };

  // Everything that comes from the data set enters the page as text or as the source of a picture, never as HTML.
  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const wording = (item, caption) => item.captions[caption] || item.captions[0] || item.key;
  const words = (text) => {
    const node = make("div", "words", text);
    node.dir = "auto";
    node.title = text;
    return node;
  };

  const picture = (modality, item) => {
    const name = pictures[modality];
    const noun = nouns[modality] || modality;
    if (!item[name]) return make("div", "picture " + name, "no picture of this " + noun);
    const node = make("img", "picture " + name);
    node.alt = (modality === "audio" ? "waveform of " : "frame of ") + wording(item, 0);
    node.loading = "lazy";
    node.src = item[name];
    return node;
  };

  const show = (node, modality, [number, caption]) => {
    const item = data.items[number];
    if (modality in pictures) node.append(picture(modality, item));
    node.append(words(wording(item, caption)));
  };

  const tile = (modality, entry, place, score, className) => {
    const node = make("li", "tile" + className);
    const line = make("div", "place");
    line.append(make("span", "", place), make("span", "", score.toFixed(2)));
    node.append(line);
    show(node, modality, entry);
    return node;
  };

  const card = (direction, example) => {
    const node = make("article", "card");
    const asked = make("div", "asked");
    asked.append(make("div", "kind", "query: " + (nouns[direction.query] || direction.query)));
    show(asked, direction.query, example.query);
    const missing = data.items[example.query[0]].missing;
    if (missing.length) asked.append(make("div", "kind", "this clip has no " + missing.map((m) => nouns[m] || m).join(", no ")));
    const verdict = make("div", example.rank === 1 ? "verdict first" : "verdict");
    verdict.append("right answer at ", make("b", "", "rank " + example.rank), " of " + direction.size);
    if (example.tied) verdict.append(" (expected, tied with " + example.tied + ")");
    asked.append(verdict);

    const found = make("ol", direction.gallery in pictures ? "found" : "found lines");
    example.top.forEach((entry, index) => {
      const right = entry[3];
      found.append(tile(direction.gallery, entry, (index + 1) + (right ? " ✓ right" : ""), entry[2], right ? " right" : ""));
    });
    if (example.right) {
      found.append(tile(direction.gallery, example.right, "✓ rank " + example.rank, example.right[2], " later"));
    }
    node.append(asked, found);
    return node;
  };

  const group = (name, legend, options) => {
    const field = make("fieldset");
    field.append(make("legend", "", legend));
    options.forEach((option, index) => {
      const label = make("label");
      const input = make("input");
      input.type = "radio";
      input.name = name;
      input.value = option.value;
      input.checked = index === 0;
      label.append(input, make("span", "", option.text));
      field.append(label);
    });
    return field;
  };
  const chosen = (name) => form.elements[name] ? form.elements[name].value : "0";

  const fillDirections = () => {
    const list = data.lists[Number(chosen("list"))];
    const options = list.directions.map((direction, index) => (
      { value: String(index), text: direction.query + " → " + direction.gallery }
    ));
    const field = group("direction", "Direction", options);
    const old = form.querySelector("fieldset.directions");
    field.classList.add("directions");
    if (old) old.replaceWith(field);
    else form.append(field);
  };

  const draw = () => {
    const list = data.lists[Number(chosen("list"))];
    const direction = list.directions[Number(chosen("direction"))];
    const kind = chosen("kind");
    const examples = direction.examples[kind];
    status.textContent = examples.length + (examples.length === 1 ? " query " : " queries ") + kinds[kind] +
      ", each with its first " + (examples.length ? examples[0].top.length : 0) + ".";
    cards.className = examples.some((example) => example.right) ? "six" : "";
    cards.replaceChildren(...examples.map((example) => card(direction, example)));
  };

  if (data.lists.length > 1) {
    form.append(group("list", "List", data.lists.map((list, index) => ({ value: String(index), text: list.title }))));
  }
  fillDirections();
  form.append(group("kind", "Show", Object.keys(kinds).map((kind) => ({ value: kind, text: kind }))));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => {
    if (event.target.name === "list") fillDirections();
    draw();
  });
  draw();
})();
