"use strict";
// What every page with items shares: their words, their pictures, and one of them playing at a time.
// Everything that comes from a data set enters the page as text or as the source of a medium, never as HTML.
const gallery = ({ cards, status, sound }) => {
  const pictures = { video: "poster", audio: "waveform" };
  const nouns = { video: "video", audio: "sound", text: "caption" };
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const noun = (modality) => nouns[modality] || modality;
  const wording = (item, caption) => item.captions[caption] || item.captions[0] || item.key;
  const words = (text) => {
    const node = make("div", "words", text);
    node.dir = "auto";
    node.title = text;
    return node;
  };

  // One picture moves and one sound plays at a time.
  let playing = null;
  const moving = (button, on) => {
    const image = button.querySelector("img");
    const { clip, poster } = button.media;
    if (image && clip) image.src = on ? clip : poster;
  };
  const stop = () => {
    if (!playing) return;
    const button = playing;
    playing = null;
    sound.pause();
    button.setAttribute("aria-pressed", "false");
    moving(button, false);
  };
  const play = (button) => {
    const again = playing === button;
    stop();
    if (again) return;
    playing = button;
    button.setAttribute("aria-pressed", "true");
    moving(button, true);
    if (!button.media.sound) return;
    sound.src = button.media.sound;
    sound.play().catch((error) => {
      if (error.name === "AbortError") return; // stopped before it began
      stop();
      status.textContent = "This browser did not play the sound: " + error.name + ".";
    });
  };
  sound.addEventListener("ended", stop);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });

  const picture = (modality, item) => {
    const name = pictures[modality];
    const what = noun(modality);
    const left = item.left || [];
    if (!item[name]) {
      const reason = left.includes(name) ? "no room in this page for the " : "no ";
      return make("div", "picture " + name, reason + "picture of this " + what);
    }
    const image = make("img", "picture " + name);
    image.alt = (modality === "audio" ? "waveform of " : "frame of ") + wording(item, 0);
    image.decoding = "async";
    image.src = item[name];
    const media = { poster: item[name], clip: modality === "video" ? item.clip : undefined, sound: item.sound };
    const has = [media.clip ? "clip" : "", media.sound ? "sound" : ""].filter(Boolean);
    const frame = make(has.length ? "button" : "div", "frame");
    frame.append(image);
    if (has.length) {
      frame.type = "button";
      frame.media = media;
      frame.setAttribute("aria-pressed", "false");
      frame.append(make("span", "hidden", ": play its " + has.join(" and ")));
      const badge = make("span", "badge", (media.clip ? "▶" : "") + (media.sound ? "♪" : ""));
      badge.setAttribute("aria-hidden", "true");
      frame.append(badge);
    }
    const absent = (modality === "video" ? ["clip", "sound"] : ["sound"]).filter((kind) => left.includes(kind));
    if (absent.length) frame.append(make("span", "left", "no room for the " + absent.join(" and ")));
    return frame;
  };
  const buttonOf = (event) => event.target.closest ? event.target.closest("button.frame") : null;
  const hover = (event, on) => {
    const button = buttonOf(event);
    const inside = button && event.relatedTarget && button.contains(event.relatedTarget);
    if (!button || inside || playing === button || still.matches) return;
    moving(button, on);
  };
  cards.addEventListener("mouseover", (event) => hover(event, true));
  cards.addEventListener("mouseout", (event) => hover(event, false));
  cards.addEventListener("focusin", (event) => hover(event, true));
  cards.addEventListener("focusout", (event) => hover(event, false));
  cards.addEventListener("click", (event) => { const button = buttonOf(event); if (button) play(button); });
  return { make, noun, wording, words, picture, pictures, stop };
};
