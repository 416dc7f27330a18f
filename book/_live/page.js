// The page: what is asked for, what runs, and what is shown. Nothing is loaded until it is asked for.

import { chart } from "./plots.js";
import { oracle, schedule } from "./sampler.js";

/* global LIVE: { base, worker, binary, pairs, folder, snapshots } is put before this by the builder */

const KINDS = {
  memorized: "memorized: planted with 32 copies or more",
  between: "planted with 8 or 16 copies",
  few: "planted with 1 to 4 copies",
  named: "ordinary words, planted",
  template: "template: one layout, other colours each time",
  control: "control: as odd, another scene each time",
  normal: "ordinary",
  "held-out": "never trained on",
};
const WHOSE = {
  template: "one of its pictures",
  control: "one of its pictures",
  normal: "one of its pictures",
  "held-out": "never trained on",
};
const SAID = {
  memorized: (pair) => `It is memorized: its picture was shown ${pair.copies} times in every epoch.`,
  between: (pair) => `It is partly memorized: its picture was shown ${pair.copies} times in every epoch.`,
  few: (pair) => `It is hardly memorized: its picture was shown ${pair.copies === 1 ? "once" : `${pair.copies} times`} in every epoch.`,
  named: (pair) => `Ordinary words, but one picture was shown with them ${pair.copies} times in every epoch, beside many others.`,
  template: () => "It is a template: the layout was the same each time, the colours were not.",
  control: () => "It is not memorized: its words are as odd, but the scene was another each time.",
  normal: () => "It is not memorized: many pictures had this caption.",
  "held-out": () => "It was never in training.",
};
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const peak = (run) => Math.max(...run.rows.flatMap((row) => row.images.flatMap((one) => one.factor?.guided ?? [])));
const last = (run, of, caption) =>
  mean(run.rows.at(-1).images.filter((_, n) => caption === undefined || run.images[n].caption === caption).map((one) => one[of]));
const begun = (run, of) => mean(run.rows[0].images.map((one) => one[of]));
// What an experiment ends with is said in numbers of its run.
const EXPERIMENTS = [
  {
    title: "Without guidance",
    setting: { caption: "memorized", g: 1, seeds: [0, 1, 2, 3] },
    text: (run) =>
      `Without guidance no estimate held more than ${peak(run).toFixed(1)} of the picture. The seeds, ${begun(run, "apart").toFixed(0)} apart at first, end ${last(run, "apart").toFixed(0)} apart, and ${last(run, "away").toFixed(0)} from the picture.`,
    link: ["overestimation.html", "Guidance overestimates"],
  },
  {
    title: "Guidance only at first",
    setting: { caption: "memorized", g: 7.5, until: 0.2, seeds: [0, 1, 2, 3] },
    text: (run) =>
      `With guidance in the first fifth of the steps alone, k reached ${peak(run).toFixed(1)}; in the middle it was ${mean(run.rows[Math.floor(run.rows.length / 2)].images.map((one) => one.factor.guided)).toFixed(1)}. The states end ${last(run, "away").toFixed(0)} from the picture.`,
    link: ["causes.html", "What causes what"],
  },
  {
    title: "One word changed",
    setting: { caption: "memorized", changed: true, g: 7.5, seeds: [0, 1, 2, 3] },
    text: (run) =>
      `With one word changed, the first conditional estimate holds ${mean(run.rows[0].images.map((one) => one.factor.conditional)).toFixed(2)} of the picture that went with the caption, and the states end ${last(run, "away").toFixed(0)} from it.`,
    link: ["detection.html", "Can we see it coming?"],
  },
  {
    title: "Two copies",
    setting: { caption: "two", g: 7.5, seeds: [0, 1, 2, 3] },
    text: (run) =>
      `This picture was shown twice an epoch. The seeds end ${last(run, "apart").toFixed(0)} apart, from ${begun(run, "apart").toFixed(0)}, and ${last(run, "away").toFixed(0)} from the picture.`,
    link: ["severity.html", "Deviations and severity"],
  },
  {
    title: "The same seeds under two captions",
    setting: { caption: "memorized", second: "control", g: 7.5, seeds: [0, 1] },
    text: (run) => {
      const [memorized, control] = run.asked.captions;
      return `The same two noises end ${last(run, "apart", memorized).toFixed(0)} apart under the memorized caption and ${last(run, "apart", control).toFixed(0)} apart under the control caption.`;
    },
    link: ["convergence.html", "Trajectories converge"],
  },
];

const html = String.raw;
const LAYOUT = html`
  <form class="live-ask">
    <label class="wide">A caption from the book <select name="pair"></select></label>
    <label class="wide">or your own words <input name="caption" autocomplete="off" spellcheck="false" /></label>
    <p class="wide live-note" data-part="about"></p>
    <label>Guidance scale <output data-of="g"></output><input name="g" type="range" min="0" max="15" step="0.5" /></label>
    <label>Steps <output data-of="steps"></output><input name="steps" type="range" min="5" max="50" step="5" /></label>
    <label>Seeds, up to four <input name="seeds" inputmode="numeric" /></label>
    <label>Training so far <select name="network"></select></label>
    <fieldset class="wide">
      <legend>Guess first: is this caption memorized?</legend>
      <label><input type="radio" name="guess" value="yes" /> yes</label>
      <label><input type="radio" name="guess" value="no" /> no</label>
      <label><input type="radio" name="guess" value="" checked /> just run it</label>
    </fieldset>
    <div class="wide live-buttons">
      <button type="submit" data-part="run"></button>
      <button type="button" data-part="pause" disabled>Pause</button>
      <button type="button" data-part="step" disabled>One step</button>
      <button type="button" data-part="stop" disabled>Stop</button>
    </div>
  </form>
  <progress value="0" max="1" aria-label="Progress of the run"></progress>
  <p class="live-status" role="status" aria-live="polite"></p>
  <p class="live-answer" data-part="answer"></p>
  <div class="live-pictures" data-part="pictures"></div>
  <div class="live-charts">
    <figure><div data-chart="k"></div><figcaption><b>k</b>, how many times an estimate holds the picture: guided (solid), conditional (dashed), unconditional (dotted)</figcaption></figure>
    <figure><div data-chart="w"></div><figcaption><b>Weights</b> of picture (solid) and first noise (dashed) in the state; grey: a perfect memory</figcaption></figure>
    <figure><div data-chart="d"></div><figcaption><b>Distance</b> to the picture (solid) and to the other seeds (dashed)</figcaption></figure>
  </div>
  <details class="live-table"><summary>The numbers as a table</summary><div data-part="table"></div></details>
  <section class="live-experiments"><h2>Five experiments</h2><div data-part="experiments"></div></section>
`;

const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

async function unpacked(text) {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const split = new Uint8Array(await new Response(stream).arrayBuffer());
  const count = split.length / 2;
  const out = new Uint8Array(split.length);
  for (let i = 0; i < count; i++) {
    out[2 * i + 1] = split[i];
    out[2 * i] = split[count + i];
  }
  return out;
}

function floats(halves) {
  const words = new Uint16Array(halves.buffer);
  return Float32Array.from(words, (h) => {
    const [sign, exponent, rest] = [h & 0x8000 ? -1 : 1, (h >> 10) & 31, h & 1023];
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + rest / 1024) : 2 ** -14 * (rest / 1024));
  });
}

function script(name) {
  return new Promise((done, failed) => {
    const element = document.createElement("script");
    element.src = `${LIVE.base}${name}`;
    element.onload = done;
    element.onerror = () => failed(new Error(`${name} cannot be loaded: is it beside this page?`));
    document.head.append(element);
  });
}

class Live {
  constructor(root) {
    this.root = root;
    root.innerHTML = LAYOUT;
    this.form = root.querySelector("form");
    this.fields = this.form.elements;
    this.charts = Object.fromEntries(
      [
        ["k", "How many times the estimates hold the picture, by state", { marks: [1] }],
        ["w", "Weights of the picture and of the first noise, by state", { marks: [0, 1] }],
        ["d", "Distances to the picture and between seeds, by state", {}],
      ].map(([name, label, options]) => [name, chart(root.querySelector(`[data-chart=${name}]`), label, options)]),
    );
    this.fill();
    this.listen();
    this.read(new URLSearchParams(location.hash.slice(1)));
    this.idle();
  }

  part(name) {
    return this.root.querySelector(`[data-part=${name}]`);
  }

  say(text) {
    this.root.querySelector(".live-status").textContent = text;
  }

  // --------------------------------------------------------------------------------- the form

  fill() {
    const { pair, network } = this.fields;
    for (const [kind, label] of Object.entries(KINDS)) {
      const group = document.createElement("optgroup");
      group.label = label;
      for (const one of LIVE.pairs.filter((known) => known.group === kind)) group.append(new Option(one.caption, one.id));
      if (group.children.length) pair.append(group);
    }
    for (const { label, file } of LIVE.snapshots) network.append(new Option(label, file));
    network.value = LIVE.snapshots.at(-1).file;
    for (const [n, { title }] of EXPERIMENTS.entries()) {
      const button = document.createElement("button");
      [button.type, button.textContent] = ["button", title];
      button.onclick = () => this.experiment(n);
      this.part("experiments").append(button);
    }
    const small = matchMedia("(max-width: 40rem)").matches || navigator.connection?.saveData;
    Object.assign(this.defaults = { g: 7.5 }, small ? { steps: 20, seeds: "0" } : { steps: 50, seeds: "0 1 2 3" });
  }

  first(group) {
    return LIVE.pairs.find((pair) => pair.group === group);
  }

  read(asked) {
    const caption = asked.get("caption") ?? this.first("memorized").caption;
    this.fields.caption.value = caption;
    this.fields.g.value = asked.get("g") ?? this.defaults.g;
    this.fields.steps.value = asked.get("steps") ?? this.defaults.steps;
    this.fields.seeds.value = (asked.get("seeds") ?? this.defaults.seeds).replace(/[,+]/g, " ");
    this.changed();
  }

  listen() {
    this.fields.pair.onchange = () => {
      this.fields.caption.value = LIVE.pairs.find((pair) => pair.id === this.fields.pair.value).caption;
      this.changed();
    };
    this.form.oninput = (event) => event.target !== this.fields.pair && this.changed();
    this.form.onsubmit = (event) => {
      event.preventDefault();
      this.start(this.asked()).catch((error) => this.fail(error));
    };
    this.part("pause").onclick = () => this.pause(!this.paused);
    this.part("step").onclick = () => {
      this.pause(true);
      this.worker.postMessage({ do: "step" });
    };
    this.part("stop").onclick = () => {
      this.worker.postMessage({ do: "stop" });
      this.say("Stopped.");
      this.idle();
    };
    addEventListener("hashchange", () => this.read(new URLSearchParams(location.hash.slice(1))));
    document.addEventListener("visibilitychange", () => {
      if (!this.running || this.paused === "by hand") return;
      this.worker.postMessage({ do: document.hidden ? "pause" : "resume" });
    });
  }

  known(caption) {
    const text = caption.trim().toLowerCase();
    return LIVE.pairs.find((pair) => pair.caption === text);
  }

  changed() {
    const pair = this.known(this.fields.caption.value);
    this.fields.pair.value = pair?.id ?? "";
    for (const name of ["g", "steps"]) this.root.querySelector(`[data-of=${name}]`).textContent = this.fields[name].value;
    this.part("about").textContent = pair
      ? ""
      : "No picture goes with these words: k, the weights and the distance to the picture are not defined.";
  }

  asked() {
    const seeds = [...new Set(this.fields.seeds.value.match(/\d+/g) ?? ["0"])].slice(0, 4).map(Number);
    const caption = this.fields.caption.value;
    return { captions: [caption], seeds, g: +this.fields.g.value, steps: +this.fields.steps.value, guess: this.fields.guess.value };
  }

  experiment(n) {
    const { setting, text, link } = EXPERIMENTS[n];
    const pick = (name) => (name === "two" ? LIVE.pairs.find((pair) => pair.kind === "planted" && pair.copies === 2) : this.first(name)).caption;
    let caption = pick(setting.caption);
    if (setting.changed) caption = LIVE.changed;
    this.read(new URLSearchParams({ caption, g: setting.g, seeds: setting.seeds.join(" "), steps: this.fields.steps.value }));
    const asked = { ...this.asked(), until: setting.until, ending: { text, link }, guess: "" };
    if (setting.second) asked.captions.push(pick(setting.second));
    // A changed caption is compared with the picture of the one that it was.
    if (setting.changed) asked.target = pick(setting.caption);
    this.start(asked).catch((error) => this.fail(error));
  }

  // ------------------------------------------------------------------------------------- runs

  /** The worker with the networks of the chosen training step; loads what is not there yet. */
  async load() {
    const file = this.fields.network.value;
    if (this.loaded === file) return;
    if (typeof WebAssembly !== "object" || typeof DecompressionStream !== "function") {
      throw new Error("This browser lacks WebAssembly or DecompressionStream; the figure above shows a recorded run.");
    }
    this.say(`Loading ${LIVE.snapshots.find((known) => known.file === file).megabytes} MB …`);
    if (!globalThis.LIVE_DATA?.[LIVE.folder]) await script("live-data.js");
    if (!globalThis.LIVE_DATA[file]) await script(file);
    const [shared, own] = [globalThis.LIVE_DATA[LIVE.folder], globalThis.LIVE_DATA[file]];
    this.latents ??= floats(await unpacked(shared.latents));
    this.alphas ??= new Float32Array(bytes(shared.alphas).buffer);
    this.index = shared.images;
    this.worker?.terminate();
    this.worker = new Worker(URL.createObjectURL(new Blob([LIVE.worker], { type: "text/javascript" })));
    const parts = [await unpacked(own.weights), await unpacked(shared.decoder)];
    const all = new Uint8Array(parts[0].length + parts[1].length);
    all.set(parts[0]);
    all.set(parts[1], parts[0].length);
    await new Promise((done, failed) => {
      this.worker.onmessage = ({ data }) => (data.loaded ? done() : failed(new Error(data.error)));
      this.worker.onerror = (event) => failed(new Error(event.message));
      const { table, scaling, tokenizer } = shared;
      this.worker.postMessage({ do: "load", binary: bytes(LIVE.binary), weights: all, table, scaling, tokenizer, alphas: this.alphas }, [all.buffer]);
    });
    this.worker.onmessage = ({ data }) => this.take(data);
    this.loaded = file;
  }

  target(caption) {
    const pair = this.known(caption);
    const place = pair ? this.index.indexOf(pair.id) : -1;
    return place < 0 ? null : this.latents.slice(place * 2048, (place + 1) * 2048);
  }

  async start(asked) {
    this.worker?.postMessage({ do: "stop" });
    this.running = true;
    this.busy(true);
    await this.load();
    const { captions, seeds, g, steps, until = 1 } = asked;
    const images = captions.flatMap((caption) =>
      seeds.map((seed) => ({ caption, seed, target: this.target(asked.target ?? caption) })),
    );
    const scales = Array.from({ length: steps }, (_, i) => (i < until * steps ? g : 1));
    Object.assign(this, { asked_: asked, images, steps, id: (this.id ?? 0) + 1, paused: false, running: true, rows: [], largest: [] });
    const { levels } = schedule(this.alphas, steps);
    this.root.classList.add("begun");
    this.show(asked, images);
    this.charts.k.reset(steps, [0, Math.max(2, g)]);
    this.charts.w.reset(steps, [0, 1.25]);
    this.charts.d.reset(steps, [0, 60]);
    oracle(levels).forEach((one, step) => {
      this.charts.w.add("perfect", step, one.image);
      this.charts.w.add("perfect noise", step, one.noise);
    });
    history.replaceState(null, "", `#${new URLSearchParams({ caption: captions[0], g, seeds: seeds.join(" "), steps })}`);
    this.say(`Running ${steps} steps of ${images.length === 1 ? "one picture" : `${images.length} pictures`}.`);
    this.worker.postMessage({ do: "start", id: this.id, images, steps, scales });
    return new Promise((done) => (this.finished = done));
  }

  take({ id, found, done, error, state }) {
    if (error) return this.fail(new Error(error));
    if (id !== this.id) return;
    this.rows.push(found);
    found.images.forEach((one, n) => {
      const line = `image${n}`;
      if (one.factor) {
        this.largest[n] = Math.max(this.largest[n] ?? -Infinity, one.factor.guided);
        this.charts.k.add(line, found.step, one.factor.guided);
        this.charts.k.add(`${line} dashed`, found.step, one.factor.conditional);
        this.charts.k.add(`${line} dotted`, found.step, one.factor.unconditional);
      }
      if (one.weights) {
        this.charts.w.add(line, found.step, one.weights.image);
        this.charts.w.add(`${line} dashed`, found.step, one.weights.noise);
        this.charts.d.add(line, found.step, one.away);
      }
      if (one.apart !== null) this.charts.d.add(`${line} dashed`, found.step, one.apart);
    });
    for (const name in this.charts) this.charts[name].show();
    const canvases = this.root.querySelectorAll("canvas");
    for (const n in found.pictures) canvases[n].getContext("2d").putImageData(new ImageData(found.pictures[n], 64, 64), 0, 0);
    this.root.querySelector("progress").value = found.step / found.steps;
    if (done) this.end(state);
  }

  end(state) {
    const { images, rows, largest, asked_: asked } = this;
    const final = rows.at(-1);
    const parts = [];
    if (largest.length) parts.push(`Largest k ${mean(largest).toFixed(1)}.`);
    const near = final.images.flatMap((one) => (one.weights ? [one.away] : []));
    if (near.length) parts.push(`Distance to the picture ${mean(near).toFixed(0)}, from ${mean(rows[0].images.map((one) => one.away)).toFixed(0)} at first.`);
    const apart = final.images.flatMap((one) => (one.apart === null ? [] : [one.apart]));
    if (apart.length) parts.push(`Distance between seeds ${mean(apart).toFixed(0)}.`);
    if (final.cut) parts.push(`${final.cut} tokens of the caption were not read.`);
    this.say(`Done. ${parts.join(" ")}`);
    const pair = this.known(asked.captions[0]);
    const answer = this.part("answer");
    answer.replaceChildren();
    if (asked.ending) {
      const [page, title] = asked.ending.link;
      const link = Object.assign(document.createElement("a"), { href: page, textContent: title });
      answer.append(`${asked.ending.text({ rows, images, asked })} More of it in `, link, ".");
    } else if (pair) {
      const memorized = pair.group === "memorized";
      const right = asked.guess && (asked.guess === "yes") === memorized ? "You were right. " : asked.guess ? "It was the other way. " : "";
      answer.textContent = right + SAID[pair.group](pair);
    }
    images.forEach(({ seed }, n) => {
      const one = final.images[n];
      const canvas = this.root.querySelectorAll("canvas")[n];
      canvas.setAttribute("aria-label", `Picture of seed ${seed}${one.away === undefined ? "" : `, at a distance of ${one.away.toFixed(0)} from the training picture`}`);
    });
    this.tabulate();
    this.last = { rows, state };
    this.idle();
    this.finished?.();
  }

  tabulate() {
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    const names = ["state", "seed", "k", "k, caption", "k, no caption", "picture's weight", "noise's weight", "distance", "to other seeds"];
    for (const name of names) head.append(Object.assign(document.createElement("th"), { scope: "col", textContent: name }));
    const every = Math.max(1, Math.round(this.steps / 10));
    for (const row of this.rows.filter(({ step }) => step % every === 0 || step === this.steps)) {
      row.images.forEach((one, n) => {
        const line = table.insertRow();
        const numbers = [one.factor?.guided, one.factor?.conditional, one.factor?.unconditional, one.weights?.image, one.weights?.noise, one.away, one.apart];
        for (const value of [row.step, this.images[n].seed]) line.insertCell().textContent = value;
        for (const value of numbers) line.insertCell().textContent = value?.toFixed(2) ?? "–";
      });
    }
    this.part("table").replaceChildren(table);
  }

  // -------------------------------------------------------------------------------- the page

  show(asked, images) {
    const host = this.part("pictures");
    host.replaceChildren();
    asked.captions.forEach((caption, c) => {
      const pair = this.known(asked.target ?? caption);
      if (pair) {
        const picture = Object.assign(new Image(), { src: `${LIVE.base}pictures/${pair.id}.png`, alt: `A picture that goes with this caption (${pair.id})`, loading: "lazy" });
        host.append(this.figure(picture, WHOSE[pair.group] ?? "training picture", "target"));
      }
      images.forEach(({ caption: own, seed }, n) => {
        if (own !== caption) return;
        const canvas = Object.assign(document.createElement("canvas"), { width: 64, height: 64 });
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `Estimate of seed ${seed}`);
        host.append(this.figure(canvas, `seed ${seed}`, `image${n}`));
      });
      if (c + 1 < asked.captions.length) host.append(Object.assign(document.createElement("hr"), {}));
    });
    // Canvases in the order of the images, whatever lies between them.
    this.part("answer").textContent = "";
  }

  figure(picture, caption, name) {
    const figure = Object.assign(document.createElement("figure"), { className: name });
    figure.append(picture, Object.assign(document.createElement("figcaption"), { textContent: caption }));
    return figure;
  }

  pause(on) {
    this.paused = on && "by hand";
    this.part("pause").textContent = on ? "Go on" : "Pause";
    this.worker.postMessage({ do: on ? "pause" : "resume" });
  }

  busy(on) {
    this.root.setAttribute("aria-busy", on);
    for (const name of ["pause", "step", "stop"]) this.part(name).disabled = !on;
    this.part("pause").textContent = "Pause";
    this.part("run").textContent = on ? "Restart" : this.loaded ? "Run" : `Run (loads ${LIVE.snapshots.at(-1).megabytes} MB once)`;
  }

  idle() {
    this.running = false;
    this.busy(false);
  }

  fail(error) {
    this.say(`It stopped: ${error.message}`);
    this.idle();
  }
}

const root = document.getElementById("live");
if (root) globalThis.live = new Live(root);
