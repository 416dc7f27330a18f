// Standard normal noise as torch draws it on a CPU: torch.randn of a generator with this seed, for
// counts that are multiples of 16. Equal up to the last bits of a float.

/** The Mersenne twister, 32 bits a number. */
function twister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed >>> 0;
  for (let i = 1; i < 624; i++) {
    const before = state[i - 1] ^ (state[i - 1] >>> 30);
    state[i] = (Math.imul(before, 1812433253) + i) >>> 0;
  }
  let place = 624;
  const turn = () => {
    for (let i = 0; i < 624; i++) {
      const joined = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (joined >>> 1) ^ (joined & 1 ? 0x9908b0df : 0);
    }
    place = 0;
  };
  return () => {
    if (place === 624) turn();
    let y = state[place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** `count` numbers of a seed; Box and Muller's pairs lie eight apart in blocks of sixteen. */
export function noise(count, seed) {
  const draw = twister(seed);
  const uniform = Float32Array.from({ length: count }, () => (draw() & 0xffffff) / 2 ** 24);
  const out = new Float32Array(count);
  for (let block = 0; block < count; block += 16) {
    for (let i = block; i < block + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - uniform[i]));
      const angle = 2 * Math.PI * uniform[i + 8];
      out[i] = radius * Math.cos(angle);
      out[i + 8] = radius * Math.sin(angle);
    }
  }
  return out;
}
