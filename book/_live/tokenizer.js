// CLIP's tokenizer: byte-pair encoding of lower-case words, with a beginning, an end, and padding.

const WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;

/** Each byte as the printable character that stands for it, as in GPT-2. */
function byteCharacters() {
  const printable = (b) => (b > 32 && b < 127) || (b > 160 && b < 256 && b !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(printable(b) ? b : next++));
}

/** A function from a caption to `length` ids and how many were cut; `vocab` and `merges` are the lab's. */
export function tokenizer({ vocab, merges, begin, end, length }) {
  const rank = new Map(merges.map((pair, n) => [pair.join(" "), n]));
  const characters = byteCharacters();
  const special = { "<|startoftext|>": begin, "<|endoftext|>": end };

  function pieces(word) {
    const bytes = [...new TextEncoder().encode(word)].map((b) => characters[b]);
    bytes[bytes.length - 1] += "</w>";
    for (;;) {
      let best = -1;
      let least = Infinity;
      for (let i = 0; i + 1 < bytes.length; i++) {
        const found = rank.get(`${bytes[i]} ${bytes[i + 1]}`);
        if (found < least) [best, least] = [i, found];
      }
      if (best < 0) return bytes;
      const [left, right] = merges[least];
      for (let i = 0; i + 1 < bytes.length; i++) {
        if (bytes[i] === left && bytes[i + 1] === right) bytes.splice(i, 2, left + right);
      }
    }
  }

  return (caption) => {
    const text = caption.normalize("NFC").replace(/\s+/gu, " ").toLowerCase();
    const words = text.match(WORDS) || [];
    const ids = words.flatMap((word) => special[word] ?? pieces(word).map((piece) => vocab[piece] ?? end));
    const read = ids.slice(0, length - 2);
    const padding = Array(length - 2 - read.length).fill(end);
    return { ids: [begin, ...read, end, ...padding], cut: ids.length - read.length };
  };
}
