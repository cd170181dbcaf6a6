/* Decodes FITS stamps, plain or gzip-compressed, into the slots of a batch: the fast path of `stamps.py`.
 *
 * It decodes the layouts that surveys publish, with the same result as `stamps.py`, and leaves all other stamps to it. The
 * bytes are untrusted: each read is checked against their length, and decompression never writes beyond its buffer. The
 * GIL is released while a batch is decoded. */

#include <Python.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_arrays.h"
#include "_inflate.h"

#define CARD 80
#define BLOCK 2880
#define MAX_HEADER (4 * BLOCK)
#define MAX_LENGTH 100000 /* pixels along an axis; the product of two axes cannot overflow */
#define MAX_DIGITS 9 /* as `stamps._LENGTH` */
#define MAX_STAMP (4 << 20) /* bytes after decompression, as `stamps.MAX_STAMP_BYTES` */
#define CUTOUTS 3
#define PLANES 2
#define MAX_EXTENSIONS 4 /* as `stamps.MAX_EXTENSIONS` */
enum { ABSENT, USABLE, UNDECIDED }; /* the states of a plane, as in `stamps.py`; UNDECIDED is left to Python */

#define GZIP_HEADER 10
#define GZIP_TRAILER 8 /* the checksum and the size */
#define GZIP_DEFLATE 8
#define GZIP_NAMED 8

/* The function libdeflate_crc32 (see libdeflate.h) of the library in the Python package `deflate`. Without it,
 * gzip-compressed stamps are left to Python. */
static uint32_t (*crc32)(uint32_t, const void *, size_t);

static const char BLANKS[] = "                                                                                ";

/* Finds the value of a card "KEYWORD = value / comment", without surrounding spaces. Returns its length, or -1 if the card
 * has another keyword. */
static int card_value(const char *card, const char *keyword, const char **value)
{
    size_t n = strlen(keyword);
    if (memcmp(card, keyword, n) || memcmp(card + n, BLANKS, 8 - n) || card[8] != '=')
        return -1;
    const char *begin = card + 9, *end = card + 9;
    while (end < card + CARD && *end != '/')
        end++;
    while (begin < end && *begin == ' ')
        begin++;
    while (end > begin && end[-1] == ' ')
        end--;
    *value = begin;
    return (int)(end - begin);
}

static int card_is(const char *card, const char *keyword, const char *expected)
{
    const char *value;
    int n = card_value(card, keyword, &value);
    return n == (int)strlen(expected) && !memcmp(value, expected, (size_t)n);
}

static int is_keyword_character(char c)
{
    return ('A' <= c && c <= 'Z') || ('0' <= c && c <= '9') || c == '_' || c == '-';
}

/* The number of pixels in a card; 0 if the card is invalid. */
static int64_t card_length(const char *card, const char *keyword)
{
    const char *value;
    int n = card_value(card, keyword, &value);
    int64_t length = 0;
    for (int i = 0; i < n; i++) {
        if (n > MAX_DIGITS || value[i] < '0' || value[i] > '9' || length > MAX_LENGTH)
            return 0;
        length = 10 * length + (value[i] - '0');
    }
    return length;
}

/* An image in a FITS file. `pixels`, `end`: the offsets of its pixels, and of the header that may follow it. */
typedef struct {
    int64_t height, width, pixels, end;
    int pixel_bytes;      /* 4: float32, 8: float64 */
    int named;            /* VARIANCE, PSF, or UNNAMED without a card EXTNAME */
    int is_variance_type; /* of an extension: whether UTYPE says that the values are variances */
} Image;

enum { VARIANCE, PSF, UNNAMED };

/* Reads the header at the offset `at`, of a plain two-dimensional image of floating-point numbers. Returns 0 for any other
 * header, and for an image that is not complete. */
static int read_header(const char *fits, int64_t n_bytes, int64_t at, Image *image)
{
    const char *header = fits + at;
    int64_t limit = n_bytes - at < MAX_HEADER ? n_bytes - at : MAX_HEADER;
    if (limit < BLOCK || !(at ? card_is(header, "XTENSION", "'IMAGE   '") : card_is(header, "SIMPLE", "T")) ||
        !card_is(header + 2 * CARD, "NAXIS", "2"))
        return 0;
    image->pixel_bytes = card_is(header + CARD, "BITPIX", "-32") ? 4 : card_is(header + CARD, "BITPIX", "-64") ? 8 : 0;
    image->width = card_length(header + 3 * CARD, "NAXIS1");
    image->height = card_length(header + 4 * CARD, "NAXIS2");
    if (!image->pixel_bytes || !image->height || !image->width || image->height > MAX_LENGTH || image->width > MAX_LENGTH)
        return 0;
    image->named = UNNAMED;
    image->is_variance_type = 0;
    int has_type = 0;
    for (int64_t offset = 5 * CARD; offset + CARD <= limit; offset += CARD) {
        const char *card = header + offset;
        if (!memcmp(card, "BSCALE", 6) || !memcmp(card, "BZERO", 5))
            return 0; /* left to Python, which applies the scaling */
        if (at && !memcmp(card, "PCOUNT", 6) && !card_is(card, "PCOUNT", "0"))
            return 0;
        if (at && !memcmp(card, "EXTNAME", 7)) {
            int is_psf = card_is(card, "EXTNAME", "'PSFIMAGE'");
            if (image->named != UNNAMED || !(is_psf || card_is(card, "EXTNAME", "'UNCERT  '")))
                return 0; /* perhaps the same name, written in another way */
            image->named = is_psf ? PSF : VARIANCE;
        }
        if (at && !memcmp(card, "UTYPE", 5)) {
            if (has_type++)
                return 0;
            image->is_variance_type = card_is(card, "UTYPE", "'VarianceUncertainty'");
        }
        if (!memcmp(card, "END", 3) && !is_keyword_character(card[3])) {
            if (memcmp(card + 3, BLANKS, CARD - 3))
                return 0; /* a damaged END card */
            image->pixels = at + (offset / BLOCK + 1) * BLOCK;
            int64_t end = image->pixels + image->pixel_bytes * image->height * image->width;
            image->end = at + (end - at + BLOCK - 1) / BLOCK * BLOCK;
            return end <= n_bytes;
        }
    }
    return 0;
}

/* Reads a big-endian value. Compilers can vectorise this form without options for a specific processor. */
static inline uint32_t read_pixel(const uint8_t *p)
{
    uint32_t bits;
    memcpy(&bits, p, sizeof bits);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    bits = (bits >> 8 & 0x00FF00FF) | (bits & 0x00FF00FF) << 8;
    bits = bits >> 16 | bits << 16;
#endif
    return bits;
}

/* Reads a big-endian double as a float; a value beyond the range of floats becomes infinite. */
static inline float read_wide_pixel(const uint8_t *p)
{
    uint64_t bits = (uint64_t)read_pixel(p) << 32 | read_pixel(p + 4);
    double value;
    memcpy(&value, &bits, sizeof value);
    return (float)value;
}

static inline int is_finite(uint32_t bits)
{
    return (bits & 0x7F800000) != 0x7F800000;
}

/* The placement along one axis, as in `stamps._place`: the first pixel in the slot, the first pixel of the stamp, and the
 * number of pixels. */
static void place_axis(int64_t length, int64_t slot, int centred, int64_t *to, int64_t *from, int64_t *kept)
{
    int64_t middle = slot / 2 - length / 2;
    *to = length > slot || !centred ? 0 : middle;
    *from = length > slot ? -middle : 0;
    *kept = length > slot ? slot : length;
}

/* Writes the pixels of an image into a slot [size, size], with zeros around them, and their box. */
static void place_image(const uint8_t *fits, const Image *image, uint32_t *slot, int64_t size, int centred, int16_t *box)
{
    int64_t y0, x0, top, left, n_rows, n_columns;
    place_axis(image->height, size, centred, &y0, &top, &n_rows);
    place_axis(image->width, size, centred, &x0, &left, &n_columns);
    const uint8_t *first = fits + image->pixels + image->pixel_bytes * (top * image->width + left);
    if (n_rows < size || n_columns < size)
        memset(slot, 0, (size_t)(4 * size * size));
    for (int64_t y = 0; y < n_rows; y++) {
        const uint8_t *from = first + image->pixel_bytes * y * image->width;
        uint32_t *to = slot + (y0 + y) * size + x0;
        if (image->pixel_bytes == 4)
            for (int64_t x = 0; x < n_columns; x++)
                to[x] = read_pixel(from + 4 * x);
        else
            for (int64_t x = 0; x < n_columns; x++) {
                float value = read_wide_pixel(from + 8 * x);
                memcpy(&to[x], &value, sizeof value);
            }
    }
    box[0] = (int16_t)y0;
    box[1] = (int16_t)x0;
    box[2] = (int16_t)n_rows;
    box[3] = (int16_t)n_columns;
}

/* The number of pixels within the box that are finite (and positive); counting ends at `enough`. */
static int64_t count_pixels(const uint32_t *slot, int64_t size, const int16_t *box, int positive, int64_t enough)
{
    int64_t n = 0;
    for (int64_t y = box[0]; n < enough && y < box[0] + box[2]; y++)
        for (int64_t x = box[1]; x < box[1] + box[3]; x++) {
            uint32_t bits = slot[y * size + x];
            n += is_finite(bits) && (!positive || (bits >> 31 == 0 && bits));
        }
    return n;
}

/* The stamps of a batch: the arguments of `stamps.decode_stamps`. */
typedef struct {
    const Py_buffer *bodies;
    const int64_t *spans;
    const uint8_t *centred;
    uint32_t *slots;
    int64_t size;
    int16_t *boxes;
    uint8_t *taken; /* 1 for a stamp decoded here, 0 for one that is left to Python */
    uint32_t *variance; /* NULL if the plane is not wanted */
    uint32_t *psf;
    int64_t psf_size;
    uint8_t *states; /* [n_stamps, PLANES] */
    int64_t n_stamps;
    int64_t next; /* the first stamp that was not started yet */
} Batch;

/* A stamp that is being decompressed into `file`, a buffer of `room` bytes. */
typedef struct {
    int64_t stamp;
    uint8_t *file;
    int64_t room;
} Inflating;

static void fill_with_nan(uint32_t *slot, int64_t size)
{
    for (int64_t i = 0; i < size * size; i++)
        slot[i] = 0x7FC00000;
}

/* Writes the wanted planes of a stamp, as `stamps.decode_planes` does. `image`: the primary image. `box`: its pixels in the
 * slot. A plane is undecided if an extension is not one that surveys publish. */
static void place_planes(const Batch *batch, int64_t stamp, const uint8_t *fits, int64_t n_bytes, const Image *image,
                         const int16_t *box)
{
    uint8_t *states = batch->states + PLANES * stamp;
    uint32_t *variance = batch->variance ? batch->variance + stamp * batch->size * batch->size : NULL;
    uint32_t *psf = batch->psf ? batch->psf + stamp * batch->psf_size * batch->psf_size : NULL;
    Image planes[PLANES] = {{.end = 0}, {.end = 0}}, next = *image;
    int whole = 1;
    for (int k = 0; whole && k < MAX_EXTENSIONS && next.end < n_bytes; k++) {
        whole = read_header((const char *)fits, n_bytes, next.end, &next);
        if (whole && next.named != UNNAMED && !planes[next.named].end)
            planes[next.named] = next;
    }
    states[VARIANCE] = states[PSF] = whole ? ABSENT : UNDECIDED;
    int16_t placed[4];
    const Image *plane = &planes[VARIANCE];
    if (variance && plane->end && plane->pixel_bytes == 4) {
        states[VARIANCE] = ABSENT;
        if (plane->is_variance_type && plane->height == image->height && plane->width == image->width) {
            place_image(fits, plane, variance, batch->size, batch->centred[stamp / CUTOUTS], placed);
            states[VARIANCE] = count_pixels(variance, batch->size, box, 1, 1) ? USABLE : ABSENT;
        }
    } else if (plane->end)
        states[VARIANCE] = UNDECIDED;
    plane = &planes[PSF];
    if (psf && plane->end) {
        place_image(fits, plane, psf, batch->psf_size, 1, placed);
        int64_t n_pixels = (int64_t)placed[2] * placed[3];
        states[PSF] = count_pixels(psf, batch->psf_size, placed, 0, n_pixels) == n_pixels &&
                              count_pixels(psf, batch->psf_size, placed, 1, 1)
                          ? USABLE
                          : ABSENT;
    }
    if (!variance)
        states[VARIANCE] = ABSENT;
    else if (states[VARIANCE] == ABSENT)
        fill_with_nan(variance, batch->size);
    if (!psf)
        states[PSF] = ABSENT;
    else if (states[PSF] == ABSENT)
        fill_with_nan(psf, batch->psf_size);
}

static void place_stamp(const Batch *batch, int64_t stamp, const uint8_t *fits, int64_t n_bytes)
{
    Image image;
    if (!read_header((const char *)fits, n_bytes, 0, &image) || image.pixel_bytes != 4)
        return;
    uint32_t *slot = batch->slots + stamp * batch->size * batch->size;
    int16_t *box = batch->boxes + 4 * stamp;
    place_image(fits, &image, slot, batch->size, batch->centred[stamp / CUTOUTS], box);
    /* If the central pixel is finite, as in nearly all stamps, the other pixels need no check. */
    int64_t centre = (box[0] + box[2] / 2) * batch->size + box[1] + box[3] / 2;
    batch->taken[stamp] = is_finite(slot[centre]) || count_pixels(slot, batch->size, box, 0, 1);
    if (batch->taken[stamp] && (batch->variance || batch->psf))
        place_planes(batch, stamp, fits, n_bytes, &image, box);
}

static uint32_t read_little_endian(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* The offset of the deflate stream in a gzip file whose header has no optional field but a name (RFC 1952, section 2.3);
 * 0 for other files. */
static int64_t after_gzip_header(const uint8_t *gzip, int64_t n_bytes)
{
    if (n_bytes < GZIP_HEADER + GZIP_TRAILER || gzip[2] != GZIP_DEFLATE || gzip[3] & ~GZIP_NAMED)
        return 0;
    if (!gzip[3])
        return GZIP_HEADER;
    const uint8_t *name = gzip + GZIP_HEADER;
    const uint8_t *end = memchr(name, 0, (size_t)(n_bytes - GZIP_HEADER - GZIP_TRAILER));
    return end ? end + 1 - gzip : 0;
}

/* Opens a stream that decompresses a stamp. Returns 0 if the stamp is left to Python. */
static int open_stamp(Inflating *inflating, int64_t stamp, const uint8_t *gzip, int64_t n_bytes, Stream *stream)
{
    int64_t start = after_gzip_header(gzip, n_bytes);
    if (!crc32 || !start)
        return 0;
    int64_t n_inflated = read_little_endian(gzip + n_bytes - 4);
    if (n_inflated > MAX_STAMP)
        return 0;
    if (n_inflated > inflating->room) {
        free(inflating->file);
        inflating->file = malloc((size_t)n_inflated);
        inflating->room = inflating->file ? n_inflated : 0;
        if (!inflating->file)
            return 0;
    }
    inflating->stamp = stamp;
    /* The trailer belongs to the input, so that the last bits of the stream can be read in whole words. */
    open_stream(stream, gzip + start, gzip + n_bytes, inflating->file, n_inflated);
    return 1;
}

/* Opens the next gzip-compressed stamp of the batch, and decodes the plain stamps before it. Returns 0 if there is none. */
static int begin_stamp(Batch *batch, Inflating *inflating, Stream *stream)
{
    while (batch->next < batch->n_stamps) {
        int64_t stamp = batch->next++;
        const Py_buffer *body = &batch->bodies[stamp / CUTOUTS];
        int64_t begin = batch->spans[2 * stamp], end = batch->spans[2 * stamp + 1];
        if (begin < 0 || end <= begin || end > body->len)
            continue;
        const uint8_t *bytes = (const uint8_t *)body->buf + begin;
        if (end - begin < 2 || bytes[0] != 0x1F || bytes[1] != 0x8B)
            place_stamp(batch, stamp, bytes, end - begin);
        else if (open_stamp(inflating, stamp, bytes, end - begin, stream))
            return 1;
    }
    return 0;
}

/* Whether a stream that has ended has the size and the checksum that its trailer states. */
static int is_whole(const Stream *stream)
{
    const uint8_t *trailer = stream->in_end - GZIP_TRAILER;
    return stream->out == stream->out_end && bytes_left(stream) == GZIP_TRAILER &&
           crc32(0, stream->out_begin, (size_t)(stream->out - stream->out_begin)) == read_little_endian(trailer);
}

/* Continues a stream that has stopped: with its next block or, at its end, with the next stamp of the batch after decoding
 * the finished one. Returns 0 if there is no further stamp. */
static int go_on(Batch *batch, Inflating *inflating, Stream *stream, int status)
{
    while ((status = next_block(stream, status)) != GOING_ON) {
        if (status == AT_END && is_whole(stream))
            place_stamp(batch, inflating->stamp, stream->out_begin, stream->out - stream->out_begin);
        if (!begin_stamp(batch, inflating, stream))
            return 0;
        status = AT_END;
    }
    return 1;
}

static void decode_batch(Batch *batch)
{
    Stream *streams = malloc(STREAMS * sizeof *streams);
    Inflating inflating[STREAMS] = {{0, NULL, 0}};
    Decode *decode_all = BEST(decode_four), *decode_last = BEST(decode_one);
    int at_work[STREAMS] = {0}, n_at_work = 0, status;
    for (int k = 0; streams && k < STREAMS; k++)
        n_at_work += at_work[k] =
            begin_stamp(batch, &inflating[k], &streams[k]) && go_on(batch, &inflating[k], &streams[k], AT_END);
    while (n_at_work == STREAMS) {
        int k = decode_all(streams, &status);
        n_at_work -= !(at_work[k] = go_on(batch, &inflating[k], &streams[k], status));
    }
    for (int k = 0; k < STREAMS; k++)
        while (at_work[k]) {
            decode_last(&streams[k], &status);
            at_work[k] = go_on(batch, &inflating[k], &streams[k], status);
        }
    for (int k = 0; k < STREAMS; k++)
        free(inflating[k].file);
    free(streams);
}

PyDoc_STRVAR(decode_stamps_doc, "decode_stamps(bodies, spans, centred, slots, boxes, taken, variance, psf, states): see "
                                "`stamps.decode_stamps`.");

/* Gets the buffer of the slots for a plane, squares of `size` pixels (-1 stands for any size), or an empty buffer for
 * None. Returns -1 with an exception on failure. */
static int get_plane(PyObject *object, Py_buffer *view, Py_ssize_t n, Py_ssize_t size)
{
    *view = (Py_buffer){.buf = NULL};
    if (object == Py_None)
        return 0;
    if (get_array(object, view, 4, (Py_ssize_t[]){n, CUTOUTS, size, size}, 4, PyBUF_WRITABLE) < 0)
        return -1;
    if (view->shape[2] == view->shape[3] && view->shape[2] > 0 && view->shape[2] <= INT16_MAX)
        return 0;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_ValueError, "decode_stamps: the slots of a plane must be squares with sides from 1 to 32767");
    return -1;
}

static PyObject *decode_stamps(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    (void)module;
    if (n_args != 9 || !PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "decode_stamps: takes a list and 8 arrays");
        return NULL;
    }
    PyObject *result = NULL;
    Py_ssize_t n = PyList_Size(args[0]), n_bodies = 0;
    Py_buffer spans, centred, slots, boxes, taken, variance, psf, states;
    Py_buffer *bodies = PyMem_Calloc((size_t)n + 1, sizeof *bodies);
    if (!bodies)
        return PyErr_NoMemory();
    for (; n_bodies < n; n_bodies++)
        if (PyObject_GetBuffer(PyList_GetItem(args[0], n_bodies), &bodies[n_bodies], PyBUF_SIMPLE) < 0)
            goto release_bodies;
    if (get_array(args[1], &spans, 3, (Py_ssize_t[]){n, CUTOUTS, 2}, 8, 0) < 0)
        goto release_bodies;
    if (get_array(args[2], &centred, 1, (Py_ssize_t[]){n}, 1, 0) < 0)
        goto release_spans;
    if (get_array(args[3], &slots, 4, (Py_ssize_t[]){n, CUTOUTS, -1, -1}, 4, PyBUF_WRITABLE) < 0)
        goto release_centred;
    if (get_array(args[4], &boxes, 3, (Py_ssize_t[]){n, CUTOUTS, 4}, 2, PyBUF_WRITABLE) < 0)
        goto release_slots;
    if (get_array(args[5], &taken, 2, (Py_ssize_t[]){n, CUTOUTS}, 1, PyBUF_WRITABLE) < 0)
        goto release_boxes;
    int64_t size = slots.shape[2];
    if (slots.shape[3] != size || size < 1 || size > INT16_MAX) {
        PyErr_SetString(PyExc_ValueError, "decode_stamps: the slots must be squares with sides from 1 to 32767");
        goto release_taken;
    }
    if (get_plane(args[6], &variance, n, size) < 0)
        goto release_taken;
    if (get_plane(args[7], &psf, n, -1) < 0)
        goto release_variance;
    if (get_array(args[8], &states, 3, (Py_ssize_t[]){n, CUTOUTS, PLANES}, 1, PyBUF_WRITABLE) < 0)
        goto release_psf;

    Batch batch = {
        .bodies = bodies, .spans = spans.buf, .centred = centred.buf, .slots = slots.buf, .size = size, .boxes = boxes.buf,
        .taken = taken.buf, .variance = variance.buf, .psf = psf.buf, .psf_size = psf.buf ? psf.shape[2] : 0,
        .states = states.buf, .n_stamps = n * CUTOUTS,
    };
    Py_BEGIN_ALLOW_THREADS
    decode_batch(&batch);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);

    PyBuffer_Release(&states);
release_psf:
    PyBuffer_Release(&psf);
release_variance:
    PyBuffer_Release(&variance);
release_taken:
    PyBuffer_Release(&taken);
release_boxes:
    PyBuffer_Release(&boxes);
release_slots:
    PyBuffer_Release(&slots);
release_centred:
    PyBuffer_Release(&centred);
release_spans:
    PyBuffer_Release(&spans);
release_bodies:
    while (n_bodies)
        PyBuffer_Release(&bodies[--n_bodies]);
    PyMem_Free(bodies);
    return result;
}

PyDoc_STRVAR(use_libdeflate_doc, "use_libdeflate(path) -> whether the library at `path` has libdeflate_crc32.");

static PyObject *use_libdeflate(PyObject *module, PyObject *path)
{
    (void)module;
    PyObject *encoded;
    if (!PyUnicode_FSConverter(path, &encoded))
        return NULL;
    void *library = dlopen(PyBytes_AsString(encoded), RTLD_NOW); /* never closed, because it is needed until the process ends */
    Py_DECREF(encoded);
    void *found = library ? dlsym(library, "libdeflate_crc32") : NULL;
    *(void **)&crc32 = found; /* the conversion from dlsym's result to a function pointer that POSIX permits */
    return PyBool_FromLong(found != NULL);
}

static PyMethodDef methods[] = {
    {"decode_stamps", (PyCFunction)(void (*)(void))decode_stamps, METH_FASTCALL, decode_stamps_doc},
    {"use_libdeflate", use_libdeflate, METH_O, use_libdeflate_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_stamps", "The compiled decoder of FITS stamps.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__stamps(void)
{
    return PyModuleDef_Init(&definition);
}
