/* z ~ N(0, 1) by Philox4x32-10 and Box-Muller, fused with the update of the last step and both perturbations.
 * The arithmetic is that of rng.py and kernels.py, operation by operation, so that the bits are the same: compile
 * without contraction to fused multiply-adds and without fast-math. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TILE 16 /* groups of four elements computed together, one vector register a word */

static void philox(uint32_t out[4][TILE], uint64_t first, uint32_t stream, uint32_t seed, uint32_t parameter) {
    uint32_t c0[TILE], c1[TILE], c2[TILE], c3[TILE];
    for (int i = 0; i < TILE; i++) {
        uint64_t group = first + (uint64_t)i;
        c0[i] = (uint32_t)group;
        c1[i] = (uint32_t)(group >> 32);
        c2[i] = stream;
        c3[i] = 0;
    }
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < TILE; i++) {
            uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
            uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1[i] ^ seed, n2 = (uint32_t)(p0 >> 32) ^ c3[i] ^ parameter;
            c0[i] = n0;
            c1[i] = (uint32_t)p1;
            c2[i] = n2;
            c3[i] = (uint32_t)p0;
        }
        seed += 0x9E3779B9u;
        parameter += 0xBB67AE85u;
    }
    memcpy(out[0], c0, sizeof c0);
    memcpy(out[1], c1, sizeof c1);
    memcpy(out[2], c2, sizeof c2);
    memcpy(out[3], c3, sizeof c3);
}

static void box_muller(const uint32_t *radius_word, const uint32_t *angle_word, float *even, float *odd) {
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

static void normals(float z[4][TILE], uint64_t first, uint32_t seed, uint32_t parameter) {
    uint32_t words[4][TILE];
    philox(words, first, 0, seed, parameter);
    box_muller(words[0], words[1], z[0], z[1]);
    box_muller(words[2], words[3], z[2], z[3]);
}

/* z of the elements 4 first to 4 first + count - 1 of one parameter */
void zo_normal(float *out, int64_t count, uint64_t first, uint32_t seed, uint32_t parameter) {
    for (int64_t begin = 0; begin < count; begin += 4 * TILE) {
        float z[4][TILE];
        normals(z, first + (uint64_t)(begin / 4), seed, parameter);
        int64_t end = count - begin < 4 * TILE ? count - begin : 4 * TILE;
        for (int64_t i = 0; i < end; i++) out[begin + i] = z[i & 3][i >> 2];
    }
}

/* W <- W - (sum_k c_k z_k + decay W) for the last step's seeds; then plus = W + eps z and minus = W - eps z for this
 * step's. updates = 0 leaves W alone; plus or minus may be NULL. W is read once. */
void zo_advance(float *weights, float *plus, float *minus, int64_t count, uint64_t first, uint32_t parameter,
                int64_t updates, const uint32_t *seeds, const float *coefficients, float decay, uint32_t seed,
                float eps) {
    for (int64_t begin = 0; begin < count; begin += 4 * TILE) {
        uint64_t group = first + (uint64_t)(begin / 4);
        int64_t end = count - begin < 4 * TILE ? count - begin : 4 * TILE;
        float z[4][TILE], sum[4][TILE], w[4 * TILE];
        memcpy(w, weights + begin, sizeof(float) * (size_t)end);
        for (int64_t k = 0; k < updates; k++) {
            normals(z, group, seeds[k], parameter);
            float c = coefficients[k];
            for (int lane = 0; lane < 4; lane++)
                for (int i = 0; i < TILE; i++) {
                    float term = z[lane][i] * c;
                    sum[lane][i] = k ? sum[lane][i] + term : term;
                }
        }
        if (updates) {
            for (int64_t i = 0; i < end; i++) w[i] = w[i] - (sum[i & 3][i >> 2] + w[i] * decay);
            memcpy(weights + begin, w, sizeof(float) * (size_t)end);
        }
        if (!plus && !minus) continue;
        normals(z, group, seed, parameter);
        for (int lane = 0; lane < 4; lane++)
            for (int i = 0; i < TILE; i++) z[lane][i] = z[lane][i] * eps;
        if (plus)
            for (int64_t i = 0; i < end; i++) plus[begin + i] = w[i] + z[i & 3][i >> 2];
        if (minus)
            for (int64_t i = 0; i < end; i++) minus[begin + i] = w[i] - z[i & 3][i >> 2];
    }
}
