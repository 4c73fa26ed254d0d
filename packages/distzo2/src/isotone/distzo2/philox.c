/* z ~ N(0, 1) by Philox4x32-10 and Box-Muller, fused with the update of the last step and both perturbations.
 * The arithmetic is that of rng.py and kernels.py, operation by operation, so that the bits are the same: compile
 * without contraction to fused multiply-adds and without fast-math. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TILE 32 /* groups of four elements computed together, a few vector registers a word */
#define FLAT (4 * TILE)

/* Loops below are over a tile, without calls and branches, so that the compiler makes vectors of them; all is one
 * function in the end, so that what a tile needs stays in registers. */
#define INLINE static inline __attribute__((always_inline))

INLINE void philox(uint32_t out[4][TILE], uint64_t first, uint32_t stream, uint32_t seed, uint32_t parameter) {
    uint32_t c0[TILE], c1[TILE], c2[TILE], c3[TILE], high0[TILE], high2[TILE];
    for (int i = 0; i < TILE; i++) {
        uint64_t group = first + (uint64_t)i;
        c0[i] = (uint32_t)group;
        c1[i] = (uint32_t)(group >> 32);
        c2[i] = stream;
        c3[i] = 0;
    }
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < TILE; i++) high0[i] = (uint32_t)(((uint64_t)c0[i] * 0xD2511F53u) >> 32);
        for (int i = 0; i < TILE; i++) high2[i] = (uint32_t)(((uint64_t)c2[i] * 0xCD9E8D57u) >> 32);
        for (int i = 0; i < TILE; i++) {
            uint32_t low0 = c0[i] * 0xD2511F53u, low2 = c2[i] * 0xCD9E8D57u;
            c0[i] = high2[i] ^ c1[i] ^ seed;
            c2[i] = high0[i] ^ c3[i] ^ parameter;
            c1[i] = low2;
            c3[i] = low0;
        }
        seed += 0x9E3779B9u;
        parameter += 0xBB67AE85u;
    }
    for (int i = 0; i < TILE; i++) {
        out[0][i] = c0[i];
        out[1][i] = c1[i];
        out[2][i] = c2[i];
        out[3][i] = c3[i];
    }
}

INLINE void box_muller(const uint32_t *restrict radius_word, const uint32_t *restrict angle_word,
                       float *restrict even, float *restrict odd) {
    for (int i = 0; i < TILE; i++) {
        float u = (float)(int32_t)((radius_word[i] >> 9) * 2u + 1u) * 0x1p-24f;
        int32_t bits;
        memcpy(&bits, &u, 4);
        int32_t exponent = (bits >> 23) - 126;
        bits = (bits & 0x7fffff) | 0x3f000000;
        float m;
        memcpy(&m, &bits, 4);
        int32_t small = m < 0.70710677f;
        exponent -= small;
        m = small ? m + m : m;
        float s = (m - 1.0f) / (m + 1.0f), q = s * s;
        float series = q * (float)(1.0 / 9.0) + (float)(1.0 / 7.0);
        series = series * q + (float)(1.0 / 5.0);
        series = series * q + (float)(1.0 / 3.0);
        series = series * q;
        float log_m = s + s * series;
        float log_u = (log_m + log_m) + (float)exponent * 0.693147182f;
        float r = sqrtf(log_u * -2.0f);

        uint32_t quadrant = angle_word[i] >> 30;
        float t = (float)(int32_t)(((angle_word[i] & 0x3fffffffu) >> 7) * 2u + 1u) * 0x1p-24f - 0.5f;
        float x = t * 1.57079637f, y = x * x;
        float sine = y * (float)(1.0 / 362880.0) - (float)(1.0 / 5040.0);
        sine = sine * y + (float)(1.0 / 120.0);
        sine = sine * y - (float)(1.0 / 6.0);
        sine = sine * y;
        sine = x + x * sine;
        float cosine = y * (float)(-1.0 / 3628800.0) + (float)(1.0 / 40320.0);
        cosine = cosine * y - (float)(1.0 / 720.0);
        cosine = cosine * y + (float)(1.0 / 24.0);
        cosine = cosine * y - 0.5f;
        cosine = cosine * y + 1.0f;
        float a = quadrant & 1 ? sine : cosine, b = quadrant & 1 ? cosine : sine;
        /* a turn by quadrant * pi / 2: (c, s), (-s, c), (-c, -s), (s, -c) */
        a = (quadrant == 1 || quadrant == 2) ? -a : a;
        b = (quadrant & 2) ? -b : b;
        even[i] = r * a;
        odd[i] = r * b;
    }
}

/* z of the FLAT elements of the groups from `first` on, in their order */
INLINE void normals(float z[FLAT], uint64_t first, uint32_t seed, uint32_t parameter) {
    uint32_t words[4][TILE];
    float lanes[4][TILE];
    philox(words, first, 0, seed, parameter);
    box_muller(words[0], words[1], lanes[0], lanes[1]);
    box_muller(words[2], words[3], lanes[2], lanes[3]);
    for (int i = 0; i < TILE; i++) {
        z[4 * i] = lanes[0][i];
        z[4 * i + 1] = lanes[1][i];
        z[4 * i + 2] = lanes[2][i];
        z[4 * i + 3] = lanes[3][i];
    }
}

/* z of the elements 4 first to 4 first + count - 1 of one parameter */
void zo_normal(float *out, int64_t count, uint64_t first, uint32_t seed, uint32_t parameter) {
    for (int64_t begin = 0; begin < count; begin += FLAT) {
        float z[FLAT];
        normals(z, first + (uint64_t)(begin / 4), seed, parameter);
        int64_t size = count - begin < FLAT ? count - begin : FLAT;
        memcpy(out + begin, z, sizeof(float) * (size_t)size);
    }
}

/* W <- W - (sum_k c_k z_k + decay W) for the last step's seeds; then plus = W + eps z and minus = W - eps z for this
 * step's. updates = 0 leaves W alone; plus or minus may be NULL. W is read once. */
void zo_advance(float *weights, float *plus, float *minus, int64_t count, uint64_t first, uint32_t parameter,
                int64_t updates, const uint32_t *seeds, const float *coefficients, float decay, uint32_t seed,
                float eps) {
    for (int64_t begin = 0; begin < count; begin += FLAT) {
        uint64_t group = first + (uint64_t)(begin / 4);
        int64_t size = count - begin < FLAT ? count - begin : FLAT;
        size_t bytes = sizeof(float) * (size_t)size;
        float z[FLAT], sum[FLAT], w[FLAT] = {0}, moved[FLAT];
        memcpy(w, weights + begin, bytes);
        for (int64_t k = 0; k < updates; k++) {
            normals(z, group, seeds[k], parameter);
            float c = coefficients[k];
            if (k == 0)
                for (int i = 0; i < FLAT; i++) sum[i] = z[i] * c;
            else
                for (int i = 0; i < FLAT; i++) sum[i] = sum[i] + z[i] * c;
        }
        if (updates) {
            for (int i = 0; i < FLAT; i++) w[i] = w[i] - (sum[i] + w[i] * decay);
            memcpy(weights + begin, w, bytes);
        }
        if (!plus && !minus) continue;
        normals(z, group, seed, parameter);
        if (plus) {
            for (int i = 0; i < FLAT; i++) moved[i] = w[i] + z[i] * eps;
            memcpy(plus + begin, moved, bytes);
        }
        if (minus) {
            for (int i = 0; i < FLAT; i++) moved[i] = w[i] - z[i] * eps;
            memcpy(minus + begin, moved, bytes);
        }
    }
}
