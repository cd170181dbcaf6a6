/* Decompresses several deflate streams at the same time on one thread (RFC 1951).
 *
 * Decoding of Huffman codes is limited by latency: the position of a code is known only after the previous code is decoded.
 * Therefore a symbol of each stream is decoded in turn, so that the processor can work on all streams in parallel.
 *
 * The bytes are untrusted: no read and no write leaves its buffer. The caller must verify the checksum of the output. A
 * stream with features that common encoders do not use is refused; this does not mean that it is damaged, and the caller
 * must use another decoder. */

#ifndef BROKER_FILTER_INFLATE_H
#define BROKER_FILTER_INFLATE_H

#include <stdint.h>
#include <string.h>

enum { GOING_ON, AT_END, REFUSED };

#define LONGEST_CODE 15
#define LITERAL_CODES 288
#define DISTANCE_CODES 32
#define END_OF_BLOCK 256
#define FIRST_LENGTH 257 /* symbols from here on are lengths; the first six are 3 to 8 */
#define LITERAL_BITS 11
#define DISTANCE_BITS 9
#define PRE_BITS 7

/* A table entry: the low byte of the symbol, MARK if the symbol is 256 or more, and the width of its code. */
#define MARK 0x80
#define WIDTH 0x3F
#define LONGER (0xFF << 8 | MARK) /* the code is wider than the table */

typedef struct {
    uint16_t counts[LONGEST_CODE + 1]; /* number of codes of each width */
    uint16_t symbols[LITERAL_CODES];   /* symbols in the order of their codes */
} Code;

typedef struct {
    /* The unread bits of the eight bytes at `in`, the next bit lowest, then a 1, then zeros: the number of leading zeros is
     * the number of bits that have been read. */
    uint64_t bits;
    const uint8_t *in, *in_end;
    uint8_t *out, *out_begin, *out_end;
    int last; /* whether the current block is the last */
    Code literal_code, distance_code;
    uint16_t literals[1 << LITERAL_BITS], distances[1 << DISTANCE_BITS];
    uint32_t offsets[1 << DISTANCE_BITS]; /* per entry of `distances`: base, extra bits, width; 0: no symbol */
} Stream;

#define TOP (1ULL << 63)
#define LOW(bits, n) ((bits) & ((1ULL << (n)) - 1))

static inline uint64_t read_word(const uint8_t *p)
{
    uint64_t word;
    memcpy(&word, p, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

static inline unsigned bits_read(uint64_t bits)
{
    return (unsigned)__builtin_clzll(bits);
}

/* Loads at least 56 bits; bits after the end are zeros. Returns 0 if more bits have been read than the input has. */
static inline int refill(Stream *s)
{
    unsigned n = bits_read(s->bits);
    int64_t left = s->in_end - s->in - (n >> 3);
    if (left < 0)
        return 0;
    s->in += n >> 3;
    uint64_t word = 0;
    if (left >= 8)
        word = read_word(s->in);
    else
        for (int64_t i = 0; i < left; i++)
            word |= (uint64_t)s->in[i] << 8 * i;
    s->bits = (word | TOP) >> (n & 7);
    return 1;
}

/* The number of bytes of which no bit has been read; negative if more bits have been read than the input has. */
static inline int64_t bytes_left(const Stream *s)
{
    return s->in_end - s->in - ((bits_read(s->bits) + 7) >> 3);
}

static inline unsigned take(Stream *s, unsigned n)
{
    unsigned value = (unsigned)LOW(s->bits, n);
    s->bits >>= n;
    return value;
}

/* Builds a code and its table of 2^`table_bits` entries from the widths of the codes of its symbols (section 3.2.2). Returns
 * 0 if the code is not complete. */
static int build_code(Code *code, uint16_t *table, int table_bits, const uint8_t *widths, unsigned n_symbols)
{
    uint16_t next[LONGEST_CODE + 2];
    memset(code->counts, 0, sizeof code->counts);
    for (unsigned symbol = 0; symbol < n_symbols; symbol++)
        code->counts[widths[symbol]]++;
    code->counts[0] = 0;
    int unused = 1;
    next[1] = 0;
    for (int width = 1; width <= LONGEST_CODE; width++) {
        unused = 2 * unused - code->counts[width];
        if (unused < 0)
            return 0;
        next[width + 1] = (uint16_t)(next[width] + code->counts[width]);
    }
    if (unused)
        return 0;
    for (unsigned symbol = 0; symbol < n_symbols; symbol++)
        if (widths[symbol])
            code->symbols[next[widths[symbol]]++] = (uint16_t)symbol;

    /* To extend the table by one bit, it is duplicated, and then the entries of codes of exactly that width are written. */
    const uint16_t *symbol = code->symbols;
    uint32_t word = 0; /* the next code, its first bit lowest */
    table[0] = LONGER;
    for (int width = 1; width <= table_bits; width++) {
        memcpy(table + (1 << (width - 1)), table, sizeof *table << (width - 1));
        for (int left = code->counts[width]; left; left--, symbol++) {
            table[word] = (uint16_t)((*symbol & 0xFF) << 8 | (*symbol >> 8) * MARK | width);
            uint32_t zeros = ~word & ((1U << width) - 1);
            if (!zeros)
                break; /* this was the last code */
            uint32_t carry = 1U << (31 - __builtin_clz(zeros));
            word = (word & (carry - 1)) | carry;
        }
    }
    return 1;
}

/* Decodes a code that is wider than its table: its symbol, or -1, and its width. */
static int decode_wide(const Code *code, uint64_t bits, unsigned *width)
{
    int word = 0, first = 0, index = 0;
    for (*width = 1; *width <= LONGEST_CODE; ++*width, bits >>= 1) {
        int count = code->counts[*width];
        word |= (int)(bits & 1);
        if (word - first < count)
            return code->symbols[index + word - first];
        index += count;
        first = (first + count) << 1;
        word <<= 1;
    }
    return -1;
}

static const uint16_t LENGTH_BASES[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                        31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
static const uint8_t LENGTH_BITS[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
static const uint16_t DISTANCE_BASES[] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
                                          193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
static const uint8_t DISTANCE_EXTRA[] = {0, 0, 0, 0, 1, 1, 2, 2,  3,  3,  4,  4,  5,  5,  6,
                                         6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13};
#define LENGTHS ((int)(sizeof LENGTH_BASES / sizeof *LENGTH_BASES))
#define DISTANCES ((int)(sizeof DISTANCE_BASES / sizeof *DISTANCE_BASES))

/* Reads the widths of the codes of a block (section 3.2.7); `widths` has room for all symbols. Returns 0 if invalid. */
static int read_widths(Stream *s, uint8_t *widths, unsigned *n_literals, unsigned *n_distances)
{
    static const uint8_t order[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t pre_widths[sizeof order] = {0};
    Code code;
    uint16_t table[1 << PRE_BITS];
    if (!refill(s))
        return 0;
    *n_literals = 257 + take(s, 5);
    *n_distances = 1 + take(s, 5);
    unsigned n_pre = 4 + take(s, 4), n = *n_literals + *n_distances;
    for (unsigned i = 0; i < n_pre && refill(s); i++)
        pre_widths[order[i]] = (uint8_t)take(s, 3);
    if (*n_literals > LITERAL_CODES - 2 || !build_code(&code, table, PRE_BITS, pre_widths, sizeof order))
        return 0;
    for (unsigned i = 0; i < n;) {
        if (!refill(s))
            return 0;
        unsigned entry = table[LOW(s->bits, PRE_BITS)], symbol = entry >> 8, times, width = 0;
        take(s, entry & WIDTH);
        if (symbol < 16) {
            widths[i++] = (uint8_t)symbol;
            continue;
        }
        if (symbol == 16) {
            if (!i)
                return 0;
            width = widths[i - 1];
            times = 3 + take(s, 2);
        } else
            times = symbol == 17 ? 3 + take(s, 3) : 11 + take(s, 7);
        if (times > n - i)
            return 0;
        memset(widths + i, (int)width, times);
        i += times;
    }
    return 1;
}

/* Reads the header of a block. A stored block is read completely; the status is then AT_END. */
static int begin_block(Stream *s)
{
    uint8_t widths[LITERAL_CODES + DISTANCE_CODES];
    unsigned n_literals = LITERAL_CODES, n_distances = DISTANCE_CODES;
    if (!refill(s))
        return REFUSED;
    s->last = (int)take(s, 1);
    switch (take(s, 2)) {
    case 0: {
        if (bytes_left(s) < 4)
            return REFUSED;
        s->in = s->in_end - bytes_left(s);
        s->bits = TOP;
        unsigned size = s->in[0] | (unsigned)s->in[1] << 8, check = s->in[2] | (unsigned)s->in[3] << 8;
        s->in += 4;
        if (size != (check ^ 0xFFFF) || size > s->in_end - s->in || size > s->out_end - s->out)
            return REFUSED;
        memcpy(s->out, s->in, size);
        s->out += size;
        s->in += size;
        return AT_END;
    }
    case 1: /* section 3.2.6 */
        memset(widths, 8, 144);
        memset(widths + 144, 9, 112);
        memset(widths + 256, 7, 24);
        memset(widths + 280, 8, 8);
        memset(widths + LITERAL_CODES, 5, DISTANCE_CODES);
        break;
    case 2:
        if (!read_widths(s, widths, &n_literals, &n_distances))
            return REFUSED;
        break;
    default:
        return REFUSED;
    }
    if (!build_code(&s->literal_code, s->literals, LITERAL_BITS, widths, n_literals) ||
        !build_code(&s->distance_code, s->distances, DISTANCE_BITS, widths + n_literals, n_distances))
        return REFUSED;
    for (int i = 0; i < 1 << DISTANCE_BITS; i++) {
        int symbol = s->distances[i] >> 8;
        s->offsets[i] = symbol >= DISTANCES ? 0
            : (uint32_t)DISTANCE_BASES[symbol] << 16 | (uint32_t)DISTANCE_EXTRA[symbol] << 8 | (s->distances[i] & WIDTH);
    }
    return GOING_ON;
}

/* Decodes one symbol of any kind. The status is AT_END after the last symbol of the block. */
static int decode_symbol(Stream *s)
{
    if (!refill(s))
        return REFUSED;
    unsigned entry = s->literals[LOW(s->bits, LITERAL_BITS)], width = entry & WIDTH;
    int symbol = (int)(entry >> 8 | (entry & MARK) << 1);
    if (entry == LONGER)
        symbol = decode_wide(&s->literal_code, s->bits, &width);
    take(s, width);
    if (symbol == END_OF_BLOCK)
        return AT_END;
    if (0 <= symbol && symbol < END_OF_BLOCK) {
        if (s->out == s->out_end)
            return REFUSED;
        *s->out++ = (uint8_t)symbol;
        return GOING_ON;
    }
    symbol -= FIRST_LENGTH;
    if (symbol < 0 || symbol >= LENGTHS)
        return REFUSED;
    int64_t length = LENGTH_BASES[symbol] + take(s, LENGTH_BITS[symbol]);
    entry = s->distances[LOW(s->bits, DISTANCE_BITS)];
    width = entry & WIDTH;
    symbol = (int)(entry >> 8);
    if (entry == LONGER)
        symbol = decode_wide(&s->distance_code, s->bits, &width);
    take(s, width);
    if (symbol < 0 || symbol >= DISTANCES)
        return REFUSED;
    int64_t distance = DISTANCE_BASES[symbol] + take(s, DISTANCE_EXTRA[symbol]);
    if (distance > s->out - s->out_begin || length > s->out_end - s->out)
        return REFUSED;
    if (distance == 1)
        memset(s->out, s->out[-1], (size_t)length);
    else
        for (int64_t i = 0; i < length; i++)
            s->out[i] = s->out[i - distance];
    s->out += length;
    return GOING_ON;
}

/* A round decodes three symbols of each stream, for which 56 bits suffice. Most symbols are literals, and most of the others
 * are repetitions of 3 to 8 bytes from a distance of at least 8. All other symbols, and those near the end of a buffer, are
 * left to `decode_symbol`. In one round, a stream reads 4 words, each at most 7 bytes after the previous one, and writes 3. */
#define IN_ROOM 40
#define OUT_ROOM 24
#define HAS_ROOM(k) (in_end##k - in##k >= IN_ROOM && out_end##k - out##k >= OUT_ROOM)
#define LOAD(k) bits##k = streams[k].bits, in##k = streams[k].in, out##k = streams[k].out;
#define STORE(k) streams[k].bits = bits##k, streams[k].in = in##k, streams[k].out = out##k;
#define DECLARE(k) \
    uint64_t bits##k; \
    const uint8_t *in##k, *const in_end##k = streams[k].in_end; \
    uint8_t *out##k, *const out_end##k = streams[k].out_end; \
    LOAD(k)
#define REFILL(k) do { \
        unsigned n = bits_read(bits##k); \
        in##k += n >> 3; \
        bits##k = (read_word(in##k) | TOP) >> (n & 7); \
    } while (0);
#define LOOK(k) if (!HAS_ROOM(k)) { stopped = k; break; }
#define DECODE(k) do { \
        uint32_t entry = streams[k].literals[LOW(bits##k, LITERAL_BITS)]; \
        if (__builtin_expect(!(entry & MARK), 1)) { \
            *out##k++ = (uint8_t)(entry >> 8); \
            bits##k >>= entry & WIDTH; \
            break; \
        } \
        uint32_t length = (entry >> 8) - (FIRST_LENGTH - END_OF_BLOCK) + 3; \
        if (__builtin_expect(length - 3 < 6, 1)) { \
            uint64_t bits = bits##k >> (entry & WIDTH); \
            uint32_t offset = streams[k].offsets[LOW(bits, DISTANCE_BITS)], n_extra = offset >> 8 & WIDTH; \
            bits >>= offset & WIDTH; \
            int64_t distance = (int64_t)(offset >> 16) + (int64_t)LOW(bits, n_extra); \
            if (__builtin_expect(8 <= distance && distance <= out##k - streams[k].out_begin, 1)) { \
                memcpy(out##k, out##k - distance, 8); \
                out##k += length; \
                bits##k = bits >> n_extra; \
                REFILL(k) \
                break; \
            } \
        } \
        STORE(k) \
        *status = decode_symbol(&streams[k]); \
        LOAD(k) \
        if (*status != GOING_ON || !HAS_ROOM(k)) { \
            stopped = k; \
            goto out; \
        } \
        REFILL(k) \
    } while (0);

/* Decodes all streams until one reaches the end of its block or of a buffer, or is refused: returns its index. */
#define DEFINE_DECODE(name, EACH) \
    static int name(Stream *streams, int *status) \
    { \
        int stopped = 0; \
        EACH(DECLARE) \
        *status = GOING_ON; \
        for (;;) { \
            EACH(LOOK) \
            EACH(REFILL) \
            EACH(DECODE) \
            EACH(DECODE) \
            EACH(DECODE) \
        } \
    out: \
        EACH(STORE) \
        return stopped; \
    }
#define STREAMS 4
#define ONE(M) M(0)
#define FOUR(M) M(0) M(1) M(2) M(3)
typedef int Decode(Stream *streams, int *status);
DEFINE_DECODE(decode_one, ONE)
DEFINE_DECODE(decode_four, FOUR)
#ifdef __x86_64__
/* The BMI2 shifts, which do not change the flags, make decoding a seventh faster. Processors with BMI2 also have LZCNT. */
#define QUICK __attribute__((target("bmi2,lzcnt")))
QUICK DEFINE_DECODE(decode_one_bmi2, ONE)
QUICK DEFINE_DECODE(decode_four_bmi2, FOUR)
#define BEST(name) (__builtin_cpu_supports("bmi2") ? name##_bmi2 : name)
#else
#define BEST(name) name
#endif

/* Opens a stream that ends within [in, in_end) and decompresses to `n_out` bytes. Continue it with the status AT_END. */
static void open_stream(Stream *s, const uint8_t *in, const uint8_t *in_end, uint8_t *out, int64_t n_out)
{
    s->bits = TOP;
    s->in = in;
    s->in_end = in_end;
    s->out = s->out_begin = out;
    s->out_end = out + n_out;
    s->last = 0;
}

/* Continues a stream after `decode_*`: to the start of its next compressed block, or to its end. */
static int next_block(Stream *s, int status)
{
    while (status == GOING_ON) /* the last symbols, for which there is no room for a whole round */
        status = decode_symbol(s);
    while (status == AT_END && !s->last)
        status = begin_block(s);
    return status;
}

#endif
