// The networks at work beside the page: one update at a time, so that it can be paused and stepped.
// A page that is opened from a folder may not load a worker from a file: its text comes as a Blob.

import { networks } from "./networks.js";
import { noise } from "./noise.js";
import { distance, factors, schedule, update, weights } from "./sampler.js";
import { tokenizer } from "./tokenizer.js";

const SIZE = 2048; // numbers of a latent
let net, read, alphas, run;

/** Pixels -1 to 1 as RGBA bytes. */
function picture(pixels) {
  const out = new Uint8ClampedArray((pixels.length / 3) * 4);
  for (let i = 0; i < out.length / 4; i++) {
    for (let c = 0; c < 3; c++) out[4 * i + c] = Math.round((pixels[3 * i + c] / 2 + 0.5) * 255);
    out[4 * i + 3] = 255;
  }
  return out;
}

function begin({ id, images, steps, scales }) {
  const captions = [...new Set(["", ...images.map((image) => image.caption)])];
  const read_ = captions.map(read);
  const embedded = net.embed(read_.map((one) => one.ids));
  const length = embedded.length / captions.length;
  const row = (caption) => embedded.subarray(captions.indexOf(caption) * length, (captions.indexOf(caption) + 1) * length);
  const text = new Float32Array(2 * images.length * length);
  images.forEach((image, n) => {
    text.set(row(""), n * length);
    text.set(row(image.caption), (images.length + n) * length);
  });
  const state = new Float32Array(images.length * SIZE);
  images.forEach((image, n) => state.set(noise(SIZE, image.seed), n * SIZE));
  const { times, levels } = schedule(alphas, steps);
  const cut = Math.max(...read_.map((one) => one.cut));
  return { id, images, steps, scales, times, levels, state, cut, start: state.slice(), step: 0, text: net.condition(text) };
}

/** Mean distance of an image to the others with its caption; null where there is none. */
function apart(x, images, n) {
  const others = images.flatMap((image, m) => (m !== n && image.caption === images[n].caption ? [m] : []));
  if (!others.length) return null;
  const sum = others.reduce((total, m) => total + distance(x, x, n * SIZE, m * SIZE, SIZE), 0);
  return sum / others.length;
}

/** One state: what is measured in it, and, but in the last one, the update that follows. */
function advance() {
  const { id, images, steps, scales, times, levels, state, start, step, cut } = run;
  const last = step === steps;
  const found = { step, steps, level: levels[step], time: last ? 0 : times[step], cut, images: [], pictures: {} };
  let moved;
  if (!last) {
    const doubled = new Float32Array(2 * state.length);
    doubled.set(state);
    doubled.set(state, state.length);
    const said = net.predict(doubled, times[step], run.text);
    const [uncond, cond] = [said.subarray(0, state.length), said.subarray(state.length)];
    moved = update(state, uncond, cond, scales[step], levels[step], levels[step + 1]);
    moved.factor = (n) => factors(state, uncond, cond, images[n].target, scales[step], levels[step], n * SIZE);
  }
  images.forEach(({ target }, n) => {
    const one = { apart: apart(state, images, n) };
    if (target) {
      one.weights = weights(state, start, target, n * SIZE);
      one.away = distance(state, target, n * SIZE, 0, SIZE);
      if (!last) one.factor = moved.factor(n);
    }
    found.images.push(one);
  });
  // While it runs one estimate is decoded at each step, in turn; at the end all pictures are.
  if (last) {
    const all = net.decode(state);
    images.forEach((_, n) => (found.pictures[n] = picture(all.subarray(n * 12288, (n + 1) * 12288))));
  } else {
    const n = step % images.length;
    found.pictures[n] = picture(net.decode(moved.estimate.subarray(n * SIZE, (n + 1) * SIZE)));
    run.state = moved.state;
  }
  run.step += 1;
  self.postMessage({ id, found, done: last, state: last ? state : undefined });
  if (last) run = undefined;
}

let turning = false;
function turn() {
  if (turning) return;
  turning = true;
  const channel = new MessageChannel(); // lets other messages in between two steps
  channel.port1.onmessage = () => {
    if (!run || run.paused) {
      turning = false;
      return;
    }
    guarded(advance);
    channel.port2.postMessage(0);
  };
  channel.port2.postMessage(0);
}

function guarded(action) {
  try {
    action();
  } catch (error) {
    self.postMessage({ id: run?.id, error: String(error.message || error) });
    run = undefined;
  }
}

self.onmessage = async ({ data: message }) => {
  if (message.do === "load") {
    try {
      read = tokenizer(message.tokenizer);
      alphas = message.alphas;
      net = await networks(message.binary, message.weights, message.table, message.scaling);
      self.postMessage({ loaded: true });
    } catch (error) {
      self.postMessage({ error: String(error.message || error) });
    }
  } else if (message.do === "start") {
    guarded(() => (run = begin(message)));
    turn();
  } else if (message.do === "pause" && run) run.paused = true;
  else if (message.do === "resume" && run) {
    run.paused = false;
    turn();
  } else if (message.do === "step" && run) {
    run.paused = true;
    guarded(advance);
  } else if (message.do === "stop") run = undefined;
};
