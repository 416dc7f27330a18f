// The operations of the lab's networks, channels last, float32, WebAssembly SIMD. No libc.
// Build: clang --target=wasm32 -O3 -msimd128 -nostdlib -fno-builtin-memset -fno-builtin-memcpy -Wl,--no-entry -Wl,--export=__heap_base -Wl,--import-memory -Wl,--strip-all -Wl,-z,stack-size=65536 -o kernels.wasm kernels.c
#include <wasm_simd128.h>
typedef v128_t V;
typedef unsigned int u32;
#define API(name) __attribute__((export_name(#name)))
#define LD(p) wasm_v128_load(p)
#define ST(p, v) wasm_v128_store(p, v)
#define ADD wasm_f32x4_add
#define SUB wasm_f32x4_sub
#define MUL wasm_f32x4_mul
#define DIV wasm_f32x4_div
#define C4(x) wasm_f32x4_splat(x)
void *memset(void *d, int c, unsigned long n) { char *p = d; while (n--) *p++ = (char)c; return d; }
void *memcpy(void *d, const void *s, unsigned long n) { char *p = d; const char *q = s; while (n--) *p++ = *q++; return d; }

static inline V vexp(V x) {  // cephes expf, relative error 2e-7
  x = wasm_f32x4_pmin(wasm_f32x4_pmax(x, C4(-87.0f)), C4(88.0f));
  V n = wasm_f32x4_nearest(MUL(x, C4(1.44269504088896341f)));
  x = SUB(x, MUL(n, C4(0.693359375f)));
  x = ADD(x, MUL(n, C4(2.12194440e-4f)));
  V y = C4(1.9875691500e-4f);
  y = ADD(MUL(y, x), C4(1.3981999507e-3f));
  y = ADD(MUL(y, x), C4(8.3334519073e-3f));
  y = ADD(MUL(y, x), C4(4.1665795894e-2f));
  y = ADD(MUL(y, x), C4(1.6666665459e-1f));
  y = ADD(MUL(y, x), C4(5.0000001201e-1f));
  y = ADD(ADD(MUL(MUL(y, x), x), x), C4(1.0f));
  V e = wasm_i32x4_shl(wasm_i32x4_add(wasm_i32x4_trunc_sat_f32x4(n), wasm_i32x4_splat(127)), 23);
  return MUL(y, e);
}
static inline V vsigmoid(V x) { return DIV(C4(1.0f), ADD(C4(1.0f), vexp(wasm_f32x4_neg(x)))); }
static inline V vgelu(V x) {  // exact GELU; erf after Abramowitz and Stegun 7.1.26, error 1.5e-7
  V z = MUL(x, C4(0.70710678118654752f)), a = wasm_f32x4_abs(z);
  V t = DIV(C4(1.0f), ADD(C4(1.0f), MUL(C4(0.3275911f), a)));
  V p = C4(1.061405429f);
  p = ADD(MUL(p, t), C4(-1.453152027f)); p = ADD(MUL(p, t), C4(1.421413741f));
  p = ADD(MUL(p, t), C4(-0.284496736f)); p = ADD(MUL(p, t), C4(0.254829592f));
  V erf = SUB(C4(1.0f), MUL(MUL(p, t), vexp(wasm_f32x4_neg(MUL(a, a)))));
  erf = wasm_v128_or(erf, wasm_v128_and(z, C4(-0.0f)));
  return MUL(MUL(C4(0.5f), x), ADD(C4(1.0f), erf));
}
static inline float hsum(V v) {
  return (wasm_f32x4_extract_lane(v, 0) + wasm_f32x4_extract_lane(v, 1)) + (wasm_f32x4_extract_lane(v, 2) + wasm_f32x4_extract_lane(v, 3));
}

API(halves) void halves(float *out, const unsigned short *in, int n) {  // float16 to float32
  for (int i = 0; i < n; i++) {
    u32 h = in[i], s = (h & 0x8000u) << 16, m = h & 0x7fffu;
    union { u32 u; float f; } v;
    v.u = m << 13; v.f *= 0x1p112f; v.u |= s;  // rescales, subnormals too
    out[i] = v.f;
  }
}

// out[row, n] = sum over taps and k of in[source(row, tap), k] * w[n / 8][tap][k][n % 8] + bias[n] (+ add[row, n])
// A convolution of `taps` = 9 or 1, stride, nearest upsampling; a linear layer is taps = 1 with H = rows, W = 1.
static float zeros[512];
API(conv) void conv(float *out, const float *in, const float *w, const float *bias, const float *add, int add_rows,
                    int B, int H, int W, int K, int N, int taps, int stride, int up) {
  int OH = H * up / stride, OW = W * up / stride, M = B * OH * OW, NB = (N + 7) / 8;
  for (int r0 = 0; r0 < M; r0 += 6) {
    const float *src[9][6];
    int rows = M - r0 < 6 ? M - r0 : 6;
    for (int i = 0; i < 6; i++) {
      int r = r0 + (i < rows ? i : 0), b = r / (OH * OW), y = r / OW % OH, x = r % OW;
      for (int t = 0; t < taps; t++) {
        int yy = y * stride, xx = x * stride;
        if (taps == 9) { yy += t / 3 - 1; xx += t % 3 - 1; }
        int in_range = yy >= 0 && xx >= 0 && yy < H * up && xx < W * up;
        src[t][i] = in_range ? in + ((b * H + yy / up) * W + xx / up) * K : zeros;
      }
    }
    for (int nb = 0; nb < NB; nb++) {
      const float *p = w + nb * taps * K * 8;
      V c00 = LD(bias + nb * 8), c01 = LD(bias + nb * 8 + 4);
      V c10 = c00, c11 = c01, c20 = c00, c21 = c01, c30 = c00, c31 = c01, c40 = c00, c41 = c01, c50 = c00, c51 = c01;
      for (int t = 0; t < taps; t++) {
        const float *a0 = src[t][0], *a1 = src[t][1], *a2 = src[t][2], *a3 = src[t][3], *a4 = src[t][4], *a5 = src[t][5];
        for (int k = 0; k < K; k++, p += 8) {
          V b0 = LD(p), b1 = LD(p + 4), a;
          a = wasm_v128_load32_splat(a0 + k); c00 = ADD(c00, MUL(a, b0)); c01 = ADD(c01, MUL(a, b1));
          a = wasm_v128_load32_splat(a1 + k); c10 = ADD(c10, MUL(a, b0)); c11 = ADD(c11, MUL(a, b1));
          a = wasm_v128_load32_splat(a2 + k); c20 = ADD(c20, MUL(a, b0)); c21 = ADD(c21, MUL(a, b1));
          a = wasm_v128_load32_splat(a3 + k); c30 = ADD(c30, MUL(a, b0)); c31 = ADD(c31, MUL(a, b1));
          a = wasm_v128_load32_splat(a4 + k); c40 = ADD(c40, MUL(a, b0)); c41 = ADD(c41, MUL(a, b1));
          a = wasm_v128_load32_splat(a5 + k); c50 = ADD(c50, MUL(a, b0)); c51 = ADD(c51, MUL(a, b1));
        }
      }
      V c[12] = {c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51};
      for (int i = 0; i < rows; i++) {
        int r = r0 + i;
        float *o = out + r * N + nb * 8;
        if (N % 8 == 0) {
          V u = c[2 * i], v = c[2 * i + 1];
          if (add) {
            const float *q = add + (add_rows == 1 ? 0 : r) * N + nb * 8;  // one row for all, or one each
            u = ADD(u, LD(q)); v = ADD(v, LD(q + 4));
          }
          ST(o, u); ST(o + 4, v);
        } else {
          float tmp[8]; ST(tmp, c[2 * i]); ST(tmp + 4, c[2 * i + 1]);
          for (int j = 0; j < 8 && nb * 8 + j < N; j++) o[j] = tmp[j];
        }
      }
    }
  }
}

API(group_norm) void group_norm(float *out, const float *in, const float *scale, const float *shift, int B, int P, int C, int G, float eps, int silu) {
  static float mean[512], sq[512];
  int g = C / G;
  for (int b = 0; b < B; b++, in += P * C, out += P * C) {
    for (int c = 0; c < C; c += 4) { V s = C4(0); for (int p = 0; p < P; p++) s = ADD(s, LD(in + p * C + c)); ST(mean + c, s); }
    for (int i = 0; i < G; i++) { float s = 0; for (int j = 0; j < g; j++) s += mean[i * g + j]; s /= (float)(g * P); for (int j = 0; j < g; j++) mean[i * g + j] = s; }
    for (int c = 0; c < C; c += 4) { V s = C4(0), m = LD(mean + c); for (int p = 0; p < P; p++) { V d = SUB(LD(in + p * C + c), m); s = ADD(s, MUL(d, d)); } ST(sq + c, s); }
    for (int i = 0; i < G; i++) { float s = 0; for (int j = 0; j < g; j++) s += sq[i * g + j]; s = 1.0f / __builtin_sqrtf(s / (float)(g * P) + eps); for (int j = 0; j < g; j++) sq[i * g + j] = s; }
    for (int c = 0; c < C; c += 4) {
      V k = MUL(LD(sq + c), LD(scale + c)), m = LD(mean + c), s = LD(shift + c);
      for (int p = 0; p < P; p++) { V x = ADD(MUL(SUB(LD(in + p * C + c), m), k), s); ST(out + p * C + c, silu ? MUL(x, vsigmoid(x)) : x); }
    }
  }
}
API(layer_norm) void layer_norm(float *out, const float *in, const float *scale, const float *shift, int M, int C) {
  for (int r = 0; r < M; r++, in += C, out += C) {
    V s = C4(0); for (int c = 0; c < C; c += 4) s = ADD(s, LD(in + c));
    V m = C4(hsum(s) / (float)C); s = C4(0);
    for (int c = 0; c < C; c += 4) { V d = SUB(LD(in + c), m); s = ADD(s, MUL(d, d)); }
    V k = C4(1.0f / __builtin_sqrtf(hsum(s) / (float)C + 1e-5f));
    for (int c = 0; c < C; c += 4) ST(out + c, ADD(MUL(MUL(SUB(LD(in + c), m), k), LD(scale + c)), LD(shift + c)));
  }
}
// q [B, Tq, C], k and v [B, Tk, C], H heads; causal where asked
API(attention) void attention(float *out, const float *q, const float *k, const float *v, int B, int Tq, int Tk, int C, int H, int causal) {
  int d = C / H; float scale = 1.0f / __builtin_sqrtf((float)d), s[256] __attribute__((aligned(16)));
  for (int b = 0; b < B; b++) for (int h = 0; h < H; h++) for (int i = 0; i < Tq; i++) {
    const float *Q = q + (b * Tq + i) * C + h * d; int n = causal ? i + 1 : Tk; float top = -1e30f;
    for (int j = 0; j < n; j++) { const float *Kp = k + (b * Tk + j) * C + h * d; V a = C4(0); for (int c = 0; c < d; c += 4) a = ADD(a, MUL(LD(Q + c), LD(Kp + c))); s[j] = hsum(a) * scale; if (s[j] > top) top = s[j]; }
    for (int j = n; j < ((n + 3) & ~3); j++) s[j] = -1e30f;
    V sum = C4(0);
    for (int j = 0; j < n; j += 4) { V e = vexp(SUB(LD(s + j), C4(top))); if (j + 4 > n) { float t[4]; ST(t, e); for (int x = n - j; x < 4; x++) t[x] = 0; e = LD(t); } ST(s + j, e); sum = ADD(sum, e); }
    float inv = 1.0f / hsum(sum); float *o = out + (b * Tq + i) * C + h * d;
    for (int c = 0; c < d; c += 4) { V a = C4(0); const float *Vp = v + b * Tk * C + h * d + c; for (int j = 0; j < n; j++) a = ADD(a, MUL(C4(s[j]), LD(Vp + j * C))); ST(o + c, MUL(a, C4(inv))); }
  }
}
API(geglu) void geglu(float *out, const float *in, int M, int C) {  // in [M, 2 C]
  for (int r = 0; r < M; r++, in += 2 * C, out += C) for (int c = 0; c < C; c += 4) ST(out + c, MUL(LD(in + c), vgelu(LD(in + C + c))));
}
API(silu) void silu(float *out, const float *in, int n) { for (int i = 0; i < n; i += 4) { V x = LD(in + i); ST(out + i, MUL(x, vsigmoid(x))); } }
API(quick_gelu) void quick_gelu(float *out, const float *in, int n) { for (int i = 0; i < n; i += 4) { V x = LD(in + i); ST(out + i, MUL(x, vsigmoid(MUL(x, C4(1.702f))))); } }
API(concat) void concat(float *out, const float *a, const float *b, int M, int A, int Bc) {
  for (int r = 0; r < M; r++) { for (int c = 0; c < A; c += 4, out += 4) ST(out, LD(a + r * A + c)); for (int c = 0; c < Bc; c += 4, out += 4) ST(out, LD(b + r * Bc + c)); }
}
API(add) void add(float *out, const float *a, const float *b, int n) { for (int i = 0; i < n; i += 4) ST(out + i, ADD(LD(a + i), LD(b + i))); }
API(transpose) void transpose(float *out, const float *in, int B, int R, int C) {  // [B, R, C] to [B, C, R]
  for (int b = 0; b < B; b++) for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) out[(b * C + c) * R + r] = in[(b * R + r) * C + c];
}
