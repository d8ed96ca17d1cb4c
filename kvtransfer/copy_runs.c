/* Copies many runs of bytes at once, and takes their crc32 on the way where the processor is able.

   The target is written past the caches: it is read next by another step of the model, long after
   these lines would have been evicted, and a cached store would first fetch what it overwrites. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

/* Far enough ahead for memory, across the pages that the processor's own prefetch stops at. */
#define AHEAD 512

/* The next run lies somewhere else: what is under way when it begins need not be waited for. */
static void announce(const uint8_t *to, const uint8_t *from, size_t size) {
    for (size_t at = 0; at < AHEAD && at < size; at += 64)
        _mm_prefetch((const char *)from + at, _MM_HINT_T0);
    if (size) _mm_prefetch((const char *)to, _MM_HINT_T0);
}

static size_t until_aligned(const uint8_t *at, size_t size) {
    size_t head = (64 - ((uintptr_t)at & 63)) & 63;
    return head < size ? head : size;
}

static void copy(uint8_t *to, const uint8_t *from, size_t size) {
    size_t head = until_aligned(to, size);
    memcpy(to, from, head);
    to += head, from += head, size -= head;
    for (; size >= 64; to += 64, from += 64, size -= 64) {
        _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
        __m128i a = _mm_loadu_si128((const __m128i *)from);
        __m128i b = _mm_loadu_si128((const __m128i *)from + 1);
        __m128i c = _mm_loadu_si128((const __m128i *)from + 2);
        __m128i d = _mm_loadu_si128((const __m128i *)from + 3);
        _mm_stream_si128((__m128i *)to, a);
        _mm_stream_si128((__m128i *)to + 1, b);
        _mm_stream_si128((__m128i *)to + 2, c);
        _mm_stream_si128((__m128i *)to + 3, d);
    }
    memcpy(to, from, size);
}

static void finish(void) { _mm_sfence(); }

/* crc32 as zlib's, by folding: a block of bits is moved forward by a distance D with two carry-less
   products, by x^(D+32) and x^(D-32) modulo the polynomial, bits reversed and shifted by one. */

#define FOLDING __attribute__((target("avx512f,avx512vl,avx512bw,vpclmulqdq,pclmul,sse4.1")))
#define POLYNOMIAL 0xedb88320u

static uint32_t table[256];

__attribute__((constructor)) static void make_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) value = value >> 1 ^ (value & 1 ? POLYNOMIAL : 0);
        table[i] = value;
    }
}

static uint32_t crc_bytes(uint32_t state, const uint8_t *at, size_t size) {
    for (size_t i = 0; i < size; i++) state = state >> 8 ^ table[(state ^ at[i]) & 255];
    return state;
}

int twinpool_can_crc(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("vpclmulqdq") &&
           __builtin_cpu_supports("pclmul");
}

/* Moves `block` forward by a distance and adds what stands there; `by` holds, for each 128 bits,
   the product for their low half, then for their high half. */
FOLDING static inline __m512i fold(__m512i block, __m512i by, __m512i there) {
    __m512i low = _mm512_clmulepi64_epi128(block, by, 0x00);
    __m512i high = _mm512_clmulepi64_epi128(block, by, 0x11);
    return _mm512_ternarylogic_epi64(low, high, there, 0x96); /* xor of the three */
}

FOLDING static inline __m128i fold_128(__m128i block, __m128i there) {
    const __m128i by = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m128i low = _mm_clmulepi64_si128(block, by, 0x00);
    __m128i high = _mm_clmulepi64_si128(block, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

FOLDING static inline __m512i take(uint8_t *to, const uint8_t *from, int copies) {
    _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
    __m512i block = _mm512_loadu_si512(from);
    if (copies) _mm512_stream_si512((void *)to, block);
    return block;
}

/* `copies` is a constant wherever this is used; where it is 0, nothing is written to `to`. */
FOLDING static inline __attribute__((always_inline)) uint32_t
crc_run(uint8_t *to, const uint8_t *from, size_t size, uint32_t state, int copies) {
    const __m512i by_2048 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x1322d1430, 0x11542778a));
    const __m512i by_512 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x1c6e41596, 0x154442bd4));
    size_t head = copies ? until_aligned(to, size) : 0;
    if (copies) memcpy(to, from, head);
    state = crc_bytes(state, from, head);
    to += head, from += head, size -= head;
    if (size >= 256) {
        __m512i a = take(to, from, copies), b = take(to + 64, from + 64, copies);
        __m512i c = take(to + 128, from + 128, copies), d = take(to + 192, from + 192, copies);
        a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)state)));
        to += 256, from += 256, size -= 256;
        for (; size >= 256; to += 256, from += 256, size -= 256) {
            a = fold(a, by_2048, take(to, from, copies));
            b = fold(b, by_2048, take(to + 64, from + 64, copies));
            c = fold(c, by_2048, take(to + 128, from + 128, copies));
            d = fold(d, by_2048, take(to + 192, from + 192, copies));
        }
        d = fold(fold(fold(a, by_512, b), by_512, c), by_512, d);
        for (; size >= 64; to += 64, from += 64, size -= 64)
            d = fold(d, by_512, take(to, from, copies));
        __m128i rest = _mm512_extracti32x4_epi32(d, 0);
        rest = fold_128(rest, _mm512_extracti32x4_epi32(d, 1));
        rest = fold_128(rest, _mm512_extracti32x4_epi32(d, 2));
        rest = fold_128(rest, _mm512_extracti32x4_epi32(d, 3));
        uint8_t bytes[16];
        _mm_storeu_si128((__m128i *)bytes, rest);
        state = crc_bytes(0, bytes, sizeof bytes);
    }
    if (copies) memcpy(to, from, size);
    return crc_bytes(state, from, size);
}

/* Continues `crc` over the runs in their order; only where twinpool_can_crc. */
FOLDING
uint32_t twinpool_copy_runs_crc(uint8_t *target, const uint8_t *source, const int64_t *into,
                                const int64_t *out, const int64_t *sizes, size_t count,
                                uint32_t crc) {
    uint32_t state = ~crc;
    for (size_t i = 0; i < count; i++) {
        if (i + 1 < count)
            announce(target + into[i + 1], source + out[i + 1], (size_t)sizes[i + 1]);
        state = crc_run(target + into[i], source + out[i], (size_t)sizes[i], state, 1);
    }
    finish();
    return ~state;
}

/* The same without a copy. */
FOLDING uint32_t twinpool_crc_runs(const uint8_t *source, const int64_t *out, const int64_t *sizes,
                                   size_t count, uint32_t crc) {
    uint32_t state = ~crc;
    for (size_t i = 0; i < count; i++) {
        if (i + 1 < count) announce(source + out[i + 1], source + out[i + 1], (size_t)sizes[i + 1]);
        state = crc_run(0, source + out[i], (size_t)sizes[i], state, 0);
    }
    return ~state;
}
#else
static void copy(uint8_t *to, const uint8_t *from, size_t size) { memcpy(to, from, size); }
static void finish(void) {}
static void announce(const uint8_t *to, const uint8_t *from, size_t size) {}

int twinpool_can_crc(void) { return 0; }
#endif

void twinpool_copy_runs(uint8_t *target, const uint8_t *source, const int64_t *into,
                        const int64_t *out, const int64_t *sizes, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (i + 1 < count)
            announce(target + into[i + 1], source + out[i + 1], (size_t)sizes[i + 1]);
        copy(target + into[i], source + out[i], (size_t)sizes[i]);
    }
    finish();
}
