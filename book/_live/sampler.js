// DDIM with guidance, and what the book measures on the way: the same numbers as memlib's.

const round = Math.fround;

/** Inner product of two stretches of arrays. */
export function inner(a, b, i = 0, j = 0, count = b.length - j) {
  let sum = 0;
  for (let k = 0; k < count; k++) sum += a[i + k] * b[j + k];
  return sum;
}

/** Timesteps of `steps` updates, and the noise level (alpha bar) of every state. */
export function schedule(alphas, steps) {
  const stride = Math.floor(1000 / steps);
  const times = Array.from({ length: steps }, (_, i) => (steps - 1 - i) * stride + 1);
  const after = (t) => (t - stride >= 0 ? alphas[t - stride] : alphas[0]);
  return { times, levels: [...times.map((t) => alphas[t]), after(times[steps - 1])] };
}

/** One update of all seeds: the guided estimates, and the next state. */
export function update(x, uncond, cond, scale, level, next) {
  const [a, s] = [round(Math.sqrt(level)), round(Math.sqrt(round(1 - level)))];
  const [b, r] = [round(Math.sqrt(next)), round(Math.sqrt(round(1 - next)))];
  const estimate = new Float32Array(x.length);
  const state = new Float32Array(x.length);
  for (let k = 0; k < x.length; k++) {
    const noise = round(uncond[k] + round(scale * round(cond[k] - uncond[k])));
    estimate[k] = round(round(x[k] - round(s * noise)) / a);
    state[k] = round(round(b * estimate[k]) + round(r * noise));
  }
  return { estimate, state };
}

/** How many times the guided, conditional and unconditional estimates hold the image. */
export function factors(x, uncond, cond, image, scale, level, offset) {
  const size = inner(image, image);
  const [a, s] = [Math.sqrt(level), Math.sqrt(1 - level)];
  const state = inner(x, image, offset, 0, image.length);
  const factor = (noise) => (state - s * inner(noise, image, offset, 0, image.length)) / a / size;
  const [u, c] = [factor(uncond), factor(cond)];
  return { guided: u + scale * (c - u), conditional: c, unconditional: u };
}

/** Weights of image and initial noise in a state, by least squares. */
export function weights(x, start, image, offset) {
  const n = image.length;
  const [ii, nn, ni] = [inner(image, image), inner(start, start, offset, offset, n), inner(start, image, offset, 0, n)];
  const [xi, xn] = [inner(x, image, offset, 0, n), inner(x, start, offset, offset, n)];
  const det = ii * nn - ni * ni;
  return { image: (xi * nn - xn * ni) / det, noise: (xn * ii - xi * ni) / det };
}

/** A perfect memory's weights at every state (DDIM). */
export function oracle(levels) {
  const noise = levels.map((level) => Math.sqrt((1 - level) / (1 - levels[0])));
  return levels.map((level, i) => ({ image: Math.sqrt(level) - Math.sqrt(levels[0]) * noise[i], noise: noise[i] }));
}

/** Euclidean distance of two stretches of `count` numbers. */
export function distance(a, b, i, j, count) {
  let sum = 0;
  for (let k = 0; k < count; k++) sum += (a[i + k] - b[j + k]) ** 2;
  return Math.sqrt(sum);
}
