// The lab's three networks on the kernels of kernels.wasm. Arrays are channels last, float32.
//
// `table` says of each tensor where it lies in the weights, counted in numbers, and its shape: of a
// matrix or convolution [taps, inputs, outputs], as `memlib.site.live` packs them.

const LATENT = { channels: 8, side: 16 };
const TEXT = { length: 24, width: 128, heads: 4, layers: 2, inner: 512 };
const HEADS = 4;

/** Memory of the kernels: a stack of arrays on top of the weights. */
class Memory {
  constructor(memory, heap) {
    this.memory = memory;
    this.top = (heap + 63) & ~63;
  }

  take(count) {
    const place = this.top;
    this.top = (place + 4 * count + 63) & ~63;
    const missing = this.top - this.memory.buffer.byteLength;
    if (missing > 0) this.memory.grow(Math.ceil(missing / 65536) + 64);
    return place;
  }

  view(place, count) {
    return new Float32Array(this.memory.buffer, place, count);
  }

  put(values) {
    const place = this.take(values.length);
    this.view(place, values.length).set(values);
    return place;
  }

  /** What `fill(out)` takes for itself is given back; `out`, of `count` numbers, stays. */
  result(count, fill) {
    const out = this.take(count);
    const mark = this.top;
    fill(out);
    this.top = mark;
    return out;
  }
}

/** The networks, from the kernels' binary and the weights as float16. */
export async function networks(binary, halves, table, scaling) {
  const memory = new WebAssembly.Memory({ initial: 1024 });
  const { instance } = await WebAssembly.instantiate(binary, { env: { memory } });
  return new Networks(instance.exports, memory, halves, table, scaling);
}

class Networks {
  constructor(kernels, memory, halves, table, scaling) {
    this.kernels = kernels;
    this.table = table;
    this.scaling = scaling;
    this.heap = new Memory(memory, kernels.__heap_base.value);
    const count = halves.byteLength / 2;
    this.weights = this.heap.take(count);
    const packed = this.heap.take(count / 2);
    new Uint8Array(memory.buffer, packed, halves.byteLength).set(halves);
    kernels.halves(this.weights, packed, count);
    this.heap.top = packed; // the halves are not needed any more
    this.zeros = this.heap.put(new Float32Array(1024));
    this.bottom = this.heap.top;
  }

  at(name) {
    return this.weights + 4 * this.table[name][0];
  }

  has(name) {
    return name in this.table;
  }

  outputs(name) {
    return this.table[`${name}.weight`][4];
  }

  // --------------------------------------------------------------------------------- layers

  convolve(out, x, name, batch, side, { stride = 1, up = 1, add = 0, rows = 0, height = side } = {}) {
    const [, , taps, inputs, outputs] = this.table[`${name}.weight`];
    const bias = this.has(`${name}.bias`) ? this.at(`${name}.bias`) : this.zeros;
    const weight = this.at(`${name}.weight`);
    this.kernels.conv(out, x, weight, bias, add, rows, batch, height, side, inputs, outputs, taps, stride, up);
  }

  linear(out, x, name, rows, add = 0) {
    this.convolve(out, x, name, 1, 1, { add, height: rows });
  }

  groupNorm(out, x, name, batch, places, channels, groups, epsilon, silu) {
    const [scale, shift] = [this.at(`${name}.weight`), this.at(`${name}.bias`)];
    this.kernels.group_norm(out, x, scale, shift, batch, places, channels, groups, epsilon, silu);
  }

  layerNorm(out, x, name, rows, channels) {
    this.kernels.layer_norm(out, x, this.at(`${name}.weight`), this.at(`${name}.bias`), rows, channels);
  }

  /** A residual block; `time` is the timestep's embedding, or 0 where there is none. */
  residual(x, name, batch, side, channels, groups, epsilon, time = 0) {
    const { heap } = this;
    const [outputs, places] = [this.outputs(`${name}.conv1`), side * side];
    return heap.result(batch * places * outputs, (out) => {
      const normed = heap.take(batch * places * Math.max(channels, outputs));
      const hidden = heap.take(batch * places * outputs);
      this.groupNorm(normed, x, `${name}.norm1`, batch, places, channels, groups, epsilon, 1);
      let shift = 0;
      if (time) {
        shift = heap.take(outputs);
        this.linear(shift, time, `${name}.time_emb_proj`, 1);
      }
      this.convolve(hidden, normed, `${name}.conv1`, batch, side, { add: shift, rows: 1 });
      this.groupNorm(normed, hidden, `${name}.norm2`, batch, places, outputs, groups, epsilon, 1);
      let short = x;
      if (this.has(`${name}.conv_shortcut.weight`)) {
        short = heap.take(batch * places * outputs);
        this.convolve(short, x, `${name}.conv_shortcut`, batch, side);
      }
      this.convolve(out, normed, `${name}.conv2`, batch, side, { add: short });
    });
  }

  /** Attention of places to each other and to the text, and a gated layer. */
  transformer(x, name, batch, side, channels, text) {
    const { heap, kernels } = this;
    const [places, rows, block] = [side * side, batch * side * side, `${name}.transformer_blocks.0`];
    return heap.result(rows * channels, (out) => {
      const take = (times = 1) => heap.take(rows * channels * times);
      const [normed, hidden, query, key, value, mixed] = [take(), take(), take(), take(), take(), take()];
      this.groupNorm(normed, x, `${name}.norm`, batch, places, channels, 16, 1e-6, 0);
      this.convolve(hidden, normed, `${name}.proj_in`, batch, side);
      this.layerNorm(normed, hidden, `${block}.norm1`, rows, channels);
      this.linear(query, normed, `${block}.attn1.to_q`, rows);
      this.linear(key, normed, `${block}.attn1.to_k`, rows);
      this.linear(value, normed, `${block}.attn1.to_v`, rows);
      kernels.attention(mixed, query, key, value, batch, places, places, channels, HEADS, 0);
      this.linear(hidden, mixed, `${block}.attn1.to_out.0`, rows, hidden);
      this.layerNorm(normed, hidden, `${block}.norm2`, rows, channels);
      this.linear(query, normed, `${block}.attn2.to_q`, rows);
      const { keys, values } = text[block];
      kernels.attention(mixed, query, keys, values, batch, places, TEXT.length, channels, HEADS, 0);
      this.linear(hidden, mixed, `${block}.attn2.to_out.0`, rows, hidden);
      this.layerNorm(normed, hidden, `${block}.norm3`, rows, channels);
      const [gated, inner] = [take(8), take(4)];
      this.linear(gated, normed, `${block}.ff.net.0.proj`, rows);
      kernels.geglu(inner, gated, rows, 4 * channels);
      this.linear(hidden, inner, `${block}.ff.net.2`, rows, hidden);
      this.convolve(out, hidden, `${name}.proj_out`, batch, side, { add: x });
    });
  }

  // -------------------------------------------------------------------------------- networks

  /** Rows of token ids to embeddings, [row, token, width]. */
  embed(ids) {
    const { heap, kernels } = this;
    const { length, width, heads, layers, inner } = TEXT;
    const rows = ids.length * length;
    heap.top = this.bottom;
    const [hidden, normed, query, key, value, mixed] = Array.from({ length: 6 }, () => heap.take(rows * width));
    const [wide, bent] = [heap.take(rows * inner), heap.take(rows * inner)];
    const table = (name) => {
      const [start, count] = this.table[`text.embeddings.${name}.weight`];
      return heap.view(this.weights + 4 * start, count);
    };
    const [words, places, sum] = [table("token_embedding"), table("position_embedding"), heap.view(hidden, rows * width)];
    ids.flat().forEach((id, row) => {
      for (let c = 0; c < width; c++) sum[row * width + c] = words[id * width + c] + places[(row % length) * width + c];
    });
    for (let n = 0; n < layers; n++) {
      const layer = `text.encoder.layers.${n}`;
      this.layerNorm(normed, hidden, `${layer}.layer_norm1`, rows, width);
      this.linear(query, normed, `${layer}.self_attn.q_proj`, rows);
      this.linear(key, normed, `${layer}.self_attn.k_proj`, rows);
      this.linear(value, normed, `${layer}.self_attn.v_proj`, rows);
      kernels.attention(mixed, query, key, value, ids.length, length, length, width, heads, 1);
      this.linear(hidden, mixed, `${layer}.self_attn.out_proj`, rows, hidden);
      this.layerNorm(normed, hidden, `${layer}.layer_norm2`, rows, width);
      this.linear(wide, normed, `${layer}.mlp.fc1`, rows);
      kernels.quick_gelu(bent, wide, rows * inner);
      this.linear(hidden, bent, `${layer}.mlp.fc2`, rows, hidden);
    }
    this.layerNorm(normed, hidden, "text.final_layer_norm", rows, width);
    return heap.view(normed, rows * width).slice();
  }

  /** What the U-Net needs of embeddings [row, token, width], made once for all updates. */
  condition(embeddings) {
    const { heap } = this;
    const rows = embeddings.length / TEXT.width;
    heap.top = this.bottom;
    const given = heap.put(embeddings);
    const text = {};
    for (const name of Object.keys(this.table)) {
      const block = name.match(/^(unet\..*)\.attn2\.to_k\.weight$/)?.[1];
      if (!block) continue;
      const count = rows * this.outputs(`${block}.attn2.to_k`);
      text[block] = { keys: heap.take(count), values: heap.take(count) };
      this.linear(text[block].keys, given, `${block}.attn2.to_k`, rows);
      this.linear(text[block].values, given, `${block}.attn2.to_v`, rows);
    }
    this.conditioned = heap.top;
    return { text, batch: rows / TEXT.length };
  }

  timestep(t) {
    const { heap, kernels } = this;
    const waves = new Float32Array(64);
    for (let i = 0; i < 32; i++) {
      const rate = Math.fround(Math.exp(Math.fround((-Math.log(10000) * i) / 32)));
      const angle = Math.fround(t * rate);
      [waves[i], waves[32 + i]] = [Math.cos(angle), Math.sin(angle)];
    }
    const [first, second] = [heap.take(256), heap.take(256)];
    this.linear(first, heap.put(waves), "unet.time_embedding.linear_1", 1);
    kernels.silu(first, first, 256);
    this.linear(second, first, "unet.time_embedding.linear_2", 1);
    kernels.silu(second, second, 256);
    return second;
  }

  /** Predicted noise of states [image, channel, y, x] at one timestep, in the same order. */
  predict(x, t, { text, batch }) {
    const { heap, kernels } = this;
    heap.top = this.conditioned;
    const time = this.timestep(t);
    const given = heap.put(x);
    const first = heap.take(x.length);
    kernels.transpose(first, given, batch, LATENT.channels, LATENT.side ** 2);

    const residual = (h, name, side, channels) =>
      this.residual(h, `unet.${name}`, batch, side, channels, 16, 1e-5, time);
    const attend = (h, name, side, channels) => this.transformer(h, `unet.${name}`, batch, side, channels, text);
    const resize = (h, name, side, how) => {
      const places = side * side * (how.up ? 4 : 0.25);
      const out = heap.take(batch * places * this.outputs(`unet.${name}`));
      this.convolve(out, h, `unet.${name}`, batch, side, how);
      return out;
    };
    const join = (a, channels, b, more, side) => {
      const out = heap.take(batch * side * side * (channels + more));
      kernels.concat(out, a, b, batch * side * side, channels, more);
      return out;
    };

    const s0 = heap.take(batch * 256 * 64);
    this.convolve(s0, first, "unet.conv_in", batch, 16);
    const s1 = residual(s0, "down_blocks.0.resnets.0", 16, 64);
    const s2 = resize(s1, "down_blocks.0.downsamplers.0.conv", 16, { stride: 2 });
    const s3 = attend(residual(s2, "down_blocks.1.resnets.0", 8, 64), "down_blocks.1.attentions.0", 8, 64);
    const s4 = resize(s3, "down_blocks.1.downsamplers.0.conv", 8, { stride: 2 });
    const s5 = attend(residual(s4, "down_blocks.2.resnets.0", 4, 64), "down_blocks.2.attentions.0", 4, 112);
    let h = residual(s5, "mid_block.resnets.0", 4, 112);
    h = residual(attend(h, "mid_block.attentions.0", 4, 112), "mid_block.resnets.1", 4, 112);
    h = residual(join(h, 112, s5, 112, 4), "up_blocks.0.resnets.0", 4, 224);
    h = attend(h, "up_blocks.0.attentions.0", 4, 112);
    h = residual(join(h, 112, s4, 64, 4), "up_blocks.0.resnets.1", 4, 176);
    h = attend(h, "up_blocks.0.attentions.1", 4, 112);
    h = resize(h, "up_blocks.0.upsamplers.0.conv", 4, { up: 2 });
    h = residual(join(h, 112, s3, 64, 8), "up_blocks.1.resnets.0", 8, 176);
    h = attend(h, "up_blocks.1.attentions.0", 8, 64);
    h = residual(join(h, 64, s2, 64, 8), "up_blocks.1.resnets.1", 8, 128);
    h = attend(h, "up_blocks.1.attentions.1", 8, 64);
    h = resize(h, "up_blocks.1.upsamplers.0.conv", 8, { up: 2 });
    h = residual(join(h, 64, s1, 64, 16), "up_blocks.2.resnets.0", 16, 128);
    h = residual(join(h, 64, s0, 64, 16), "up_blocks.2.resnets.1", 16, 128);

    const [normed, last, out] = [heap.take(batch * 256 * 64), heap.take(x.length), heap.take(x.length)];
    this.groupNorm(normed, h, "unet.conv_norm_out", batch, 256, 64, 16, 1e-5, 1);
    this.convolve(last, normed, "unet.conv_out", batch, 16);
    kernels.transpose(out, last, batch, 256, LATENT.channels);
    return heap.view(out, x.length).slice();
  }

  /** Latents [image, channel, y, x] to pixels [image, y, x, rgb], -1 to 1. */
  decode(latents) {
    const { heap, kernels } = this;
    heap.top = this.conditioned ?? this.bottom;
    const batch = latents.length / (LATENT.channels * LATENT.side ** 2);
    const given = heap.put(latents.map((value) => value / this.scaling));
    const [first, mixed] = [heap.take(latents.length), heap.take(latents.length)];
    kernels.transpose(first, given, batch, LATENT.channels, LATENT.side ** 2);
    this.convolve(mixed, first, "vae.post_quant_conv", batch, 16);
    let [side, channels] = [16, 96];
    let h = heap.take(batch * 256 * 96);
    this.convolve(h, mixed, "vae.decoder.conv_in", batch, 16);
    const residual = (name) => {
      h = this.residual(h, `vae.decoder.${name}`, batch, side, channels, 8, 1e-6);
      channels = this.outputs(`vae.decoder.${name}.conv2`);
    };
    residual("mid_block.resnets.0");
    residual("mid_block.resnets.1");
    for (const n of [0, 1, 2]) {
      residual(`up_blocks.${n}.resnets.0`);
      residual(`up_blocks.${n}.resnets.1`);
      if (n === 2) break;
      const larger = heap.take(batch * 4 * side * side * channels);
      this.convolve(larger, h, `vae.decoder.up_blocks.${n}.upsamplers.0.conv`, batch, side, { up: 2 });
      [h, side] = [larger, 2 * side];
    }
    const [normed, out] = [heap.take(batch * side * side * channels), heap.take(batch * side * side * 3)];
    this.groupNorm(normed, h, "vae.decoder.conv_norm_out", batch, side * side, channels, 8, 1e-6, 1);
    this.convolve(out, normed, "vae.decoder.conv_out", batch, side);
    return heap.view(out, batch * side * side * 3).slice();
  }
}
