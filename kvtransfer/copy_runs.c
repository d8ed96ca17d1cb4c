/* Copies many runs of bytes at once.

   The target is written past the caches: it is read next by another step of the model, long after
   these lines would have been evicted, and a cached store would first fetch what it overwrites. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>

static void copy(uint8_t *to, const uint8_t *from, size_t size) {
    size_t head = (64 - ((uintptr_t)to & 63)) & 63;
    if (head > size) head = size;
    memcpy(to, from, head);
    to += head, from += head, size -= head;
    for (; size >= 64; to += 64, from += 64, size -= 64) {
        _mm_prefetch((const char *)from + 512, _MM_HINT_T0);
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
#else
static void copy(uint8_t *to, const uint8_t *from, size_t size) { memcpy(to, from, size); }
static void finish(void) {}
#endif

void twinpool_copy_runs(uint8_t *target, const uint8_t *source, const int64_t *into,
                        const int64_t *out, const int64_t *sizes, size_t count) {
    for (size_t i = 0; i < count; i++)
        copy(target + into[i], source + out[i], (size_t)sizes[i]);
    finish();
}
