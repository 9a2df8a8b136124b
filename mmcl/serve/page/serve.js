(() => {
  const at = (id) => document.getElementById(id);
  const [form, cards, status, sound] = ["filters", "cards", "status", "sound"].map(at);
  const { make, noun, wording, words, picture, pictures, stop } = gallery({ cards, status, sound });
  const TOP = 20;

  const tile = ({ item, modality, score }, place) => {
    const node = make("li", "tile");
    const line = make("div", "place");
    line.append(make("span", "", String(place + 1)), make("span", "", score.toFixed(2)));
    node.append(line);
    const looks = modality === "text" ? (item.poster ? "video" : item.waveform ? "audio" : "text") : modality;
    if (looks in pictures) node.append(picture(looks, item));
    node.append(words(wording(item, 0)));
    return node;
  };

  // Answers may come in another order than questions: only the last one counts.
  let asked = 0;
  const ask = async (address, options, what) => {
    const number = ++asked;
    stop();
    status.textContent = "Searching …";
    cards.setAttribute("aria-busy", "true");
    let found, error;
    try {
      const response = await fetch(address, options);
      const answer = await response.json();
      if (response.ok) found = answer.hits;
      else error = typeof answer.error === "string" ? answer.error : "This cannot be searched for.";
    } catch {
      error = "The server does not answer.";
    }
    if (number !== asked) return;
    cards.removeAttribute("aria-busy");
    status.textContent = error || found.length + " nearest to " + what + ".";
    const list = make("ol", "found");
    list.append(...(found || []).map(tile));
    cards.replaceChildren(...(found && found.length ? [list] : []));
  };
  const address = (kind) => {
    const chosen = form.elements.modality;
    return "search/" + kind + "?top=" + TOP + (chosen ? "&modality=" + encodeURIComponent(chosen.value) : "");
  };
  const byText = () => {
    const text = form.elements.text.value.trim();
    if (!text) return;
    form.elements.file.value = "";
    const headers = { "Content-Type": "application/json" };
    ask(address("text"), { method: "POST", headers, body: JSON.stringify({ text }) }, "“" + text + "”");
  };
  const byFile = () => {
    const file = form.elements.file.files[0];
    if (!file) return;
    form.elements.text.value = "";
    const headers = { "Content-Type": "application/octet-stream" };
    ask(address("file"), { method: "POST", headers, body: file }, file.name);
  };
  form.addEventListener("submit", (event) => { event.preventDefault(); byText(); });
  form.elements.file.addEventListener("change", byFile);

  fetch("about").then((response) => response.json()).then((facts) => {
    at("about").textContent = facts.items + " items; searched by " + facts.by.map(noun).join(", ") + ".";
    form.elements.text.closest("label").hidden = !facts.by.includes("text");
    form.elements.file.closest("label").hidden = !facts.by.some((each) => each !== "text");
    if (facts.modalities.length < 2) return;
    const field = make("fieldset", "modalities");
    field.append(make("legend", "", "Find"));
    for (const name of facts.modalities) {
      const label = make("label");
      const input = make("input");
      input.type = "radio";
      input.name = "modality";
      input.value = name;
      input.checked = name === facts.default;
      label.append(input, make("span", "", noun(name)));
      field.append(label);
    }
    field.addEventListener("change", () => (form.elements.file.files.length ? byFile : byText)());
    form.append(field);
  });
})();
