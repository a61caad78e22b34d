/* crc32c (RFC 3720, appendix B.4), eight bytes at a time where the processor has an instruction for it. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

uint32_t baton_crc32c(const uint8_t *bytes, size_t size, uint32_t crc) {
    size_t i = 0;
    crc = ~crc;
#if defined(__SSE4_2__) && defined(__x86_64__)
    uint64_t wide = crc;
    for (; i + 8 <= size; i += 8) {
        uint64_t word;
        memcpy(&word, bytes + i, sizeof word);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    crc = (uint32_t)wide;
#endif
    for (; i < size; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (0x82f63b78u & -(crc & 1));
    }
    return ~crc;
}
