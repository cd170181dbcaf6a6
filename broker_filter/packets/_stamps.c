/* Stamps into the slots of a batch, plain FITS images or gzip-ed ones: the quick way of `stamps.py`, which reads every
 * stamp that is not taken here, with the same result where both can.
 *
 * The bytes are untrusted: every read is checked against their number, and inflating writes no byte beyond what was set
 * aside. The interpreter is not held while a batch is at work. */

#include <Python.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define CARD 80
#define BLOCK 2880
#define MAX_HEADER (4 * BLOCK)
#define MAX_LENGTH 100000 /* pixels along an axis: products of two stay far from overflow */
#define MAX_STAMP (4 << 20) /* bytes, inflated; `stamps.MAX_STAMP_BYTES` */
#define CUTOUTS 3

/* libdeflate's, out of the library that `deflate` brought (see libdeflate.h): gzip-ed stamps are left alone without it. */
typedef struct libdeflate_decompressor Decompressor;
static Decompressor *(*alloc_decompressor)(void);
static void (*free_decompressor)(Decompressor *);
static int (*gzip_decompress)(Decompressor *, const void *, size_t, void *, size_t, size_t *);

static const char BLANKS[] = "                                                                                ";

/* The value of a card "KEYWORD = value / comment", without the spaces around it; its length, or -1 for another keyword. */
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

/* A number of pixels, or 0. */
static int64_t card_length(const char *card, const char *keyword)
{
    const char *value;
    int n = card_value(card, keyword, &value);
    int64_t length = 0;
    for (int i = 0; i < n; i++) {
        if (value[i] < '0' || value[i] > '9' || length > MAX_LENGTH)
            return 0;
        length = 10 * length + (value[i] - '0');
    }
    return length;
}

/* Where the pixels of a plain two-dimensional float32 image begin, or -1. */
static int64_t read_header(const char *fits, int64_t n_bytes, int64_t *height, int64_t *width)
{
    if (n_bytes < BLOCK || !card_is(fits, "SIMPLE", "T") || !card_is(fits + CARD, "BITPIX", "-32") ||
        !card_is(fits + 2 * CARD, "NAXIS", "2"))
        return -1;
    *width = card_length(fits + 3 * CARD, "NAXIS1");
    *height = card_length(fits + 4 * CARD, "NAXIS2");
    int64_t limit = n_bytes < MAX_HEADER ? n_bytes : MAX_HEADER;
    for (int64_t at = 5 * CARD; at + CARD <= limit; at += CARD) {
        const char *card = fits + at;
        if (!memcmp(card, "BSCALE", 6) || !memcmp(card, "BZERO", 5))
            return -1; /* astropy applies them */
        if (!memcmp(card, "END", 3) && !memcmp(card + 3, BLANKS, CARD - 3))
            return *height && *width ? (at / BLOCK + 1) * BLOCK : -1;
    }
    return -1;
}

/* FITS is big-endian. Written so that a compiler makes vectors of it without being told of a processor. */
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

static inline int is_finite(uint32_t bits)
{
    return (bits & 0x7F800000) != 0x7F800000;
}

/* Along one axis: the first pixel in the slot, the first of the stamp to keep, and how many. As `stamps._place`. */
static void place_axis(int64_t length, int64_t slot, int centred, int64_t *to, int64_t *from, int64_t *kept)
{
    int64_t middle = slot / 2 - length / 2;
    *to = length > slot || !centred ? 0 : middle;
    *from = length > slot ? -middle : 0;
    *kept = length > slot ? slot : length;
}

/* Pixels of a FITS file into a slot [size, size], and their box in it; 0 where stamps.py must look. */
static int place_image(const uint8_t *fits, int64_t n_bytes, uint32_t *slot, int64_t size, int centred, int16_t *box)
{
    int64_t height, width;
    int64_t start = read_header((const char *)fits, n_bytes, &height, &width);
    if (start < 0 || height > MAX_LENGTH || width > MAX_LENGTH || start + 4 * height * width > n_bytes)
        return 0;
    int64_t y0, x0, top, left, n_rows, n_columns;
    place_axis(height, size, centred, &y0, &top, &n_rows);
    place_axis(width, size, centred, &x0, &left, &n_columns);
    const uint8_t *first = fits + start + 4 * (top * width + left);
    if (n_rows < size || n_columns < size)
        memset(slot, 0, (size_t)(4 * size * size));
    /* One look at the middle spares nearly every stamp the look at all pixels. */
    int finite = is_finite(read_pixel(first + 4 * (n_rows / 2 * width + n_columns / 2)));
    for (int64_t y = 0; y < n_rows; y++) {
        const uint8_t *from = first + 4 * y * width;
        uint32_t *to = slot + (y0 + y) * size + x0;
        for (int64_t x = 0; x < n_columns; x++)
            to[x] = read_pixel(from + 4 * x);
        for (int64_t x = 0; !finite && x < n_columns; x++)
            finite = is_finite(to[x]);
    }
    box[0] = (int16_t)y0;
    box[1] = (int16_t)x0;
    box[2] = (int16_t)n_rows;
    box[3] = (int16_t)n_columns;
    return finite;
}

/* Memory that inflated stamps share, one after another. */
typedef struct {
    Decompressor *decompressor;
    uint8_t *bytes;
    size_t size;
} Scratch;

/* As `place_image`, for a stamp that may be gzip-ed. */
static int decode_stamp(const uint8_t *stamp, int64_t n_bytes, Scratch *scratch, uint32_t *slot, int64_t size, int centred,
                        int16_t *box)
{
    if (n_bytes < 2 || stamp[0] != 0x1F || stamp[1] != 0x8B)
        return place_image(stamp, n_bytes, slot, size, centred, box);
    if (n_bytes < 18 || !scratch->decompressor)
        return 0;
    const uint8_t *trailer = stamp + n_bytes - 4;
    size_t n_inflated = (size_t)trailer[0] | (size_t)trailer[1] << 8 | (size_t)trailer[2] << 16 | (size_t)trailer[3] << 24;
    if (n_inflated > MAX_STAMP)
        return 0;
    if (n_inflated > scratch->size) {
        free(scratch->bytes);
        scratch->bytes = malloc(n_inflated);
        scratch->size = scratch->bytes ? n_inflated : 0;
        if (!scratch->bytes)
            return 0;
    }
    /* Without a place for how many bytes it wrote, it fails unless they are as many as were asked for. */
    return !gzip_decompress(scratch->decompressor, stamp, (size_t)n_bytes, scratch->bytes, n_inflated, NULL) &&
           place_image(scratch->bytes, (int64_t)n_inflated, slot, size, centred, box);
}

/* A C-contiguous array of this shape, where -1 is any length, with items of `itemsize`. */
static int get_array(PyObject *object, Py_buffer *view, int n_dimensions, const Py_ssize_t *shape, Py_ssize_t itemsize,
                     int flags)
{
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | flags) < 0)
        return -1;
    int fits = view->ndim == n_dimensions && view->itemsize == itemsize && (uintptr_t)view->buf % (size_t)itemsize == 0;
    for (int axis = 0; fits && axis < n_dimensions; axis++)
        fits = shape[axis] < 0 || shape[axis] == view->shape[axis];
    if (fits)
        return 0;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_ValueError, "decode_stamps: an array of a wrong shape or type");
    return -1;
}

PyDoc_STRVAR(decode_stamps_doc, "decode_stamps(bodies, spans, centred, slots, boxes, taken): see `stamps.decode_stamps`.");

static PyObject *decode_stamps(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    (void)module;
    if (n_args != 6 || !PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "decode_stamps: a list and 5 arrays");
        return NULL;
    }
    PyObject *result = NULL;
    Py_ssize_t n = PyList_Size(args[0]), n_bodies = 0;
    Py_buffer spans, centred, slots, boxes, taken;
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
    if (slots.shape[3] != size || size > INT16_MAX) {
        PyErr_SetString(PyExc_ValueError, "decode_stamps: slots that are no squares of 16-bit sides");
        goto release_taken;
    }

    Py_BEGIN_ALLOW_THREADS
    Scratch scratch = {alloc_decompressor ? alloc_decompressor() : NULL, NULL, 0};
    for (Py_ssize_t k = 0; k < n * CUTOUTS; k++) {
        const Py_buffer *body = &bodies[k / CUTOUTS];
        int64_t begin = ((const int64_t *)spans.buf)[2 * k], end = ((const int64_t *)spans.buf)[2 * k + 1];
        ((uint8_t *)taken.buf)[k] = 0 <= begin && begin < end && end <= body->len &&
            decode_stamp((const uint8_t *)body->buf + begin, end - begin, &scratch, (uint32_t *)slots.buf + k * size * size,
                         size, ((const uint8_t *)centred.buf)[k / CUTOUTS], (int16_t *)boxes.buf + 4 * k);
    }
    free(scratch.bytes);
    if (scratch.decompressor)
        free_decompressor(scratch.decompressor);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);

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

PyDoc_STRVAR(use_libdeflate_doc, "use_libdeflate(path) -> whether gzip-ed stamps are inflated by the library that is there.");

static PyObject *use_libdeflate(PyObject *module, PyObject *path)
{
    (void)module;
    PyObject *encoded;
    if (!PyUnicode_FSConverter(path, &encoded))
        return NULL;
    void *library = dlopen(PyBytes_AsString(encoded), RTLD_NOW); /* never closed: it stays for as long as the process */
    Py_DECREF(encoded);
    /* POSIX: what dlsym gives may be stored as a function through a pointer to it. */
    void *alloc = library ? dlsym(library, "libdeflate_alloc_decompressor") : NULL;
    void *release = library ? dlsym(library, "libdeflate_free_decompressor") : NULL;
    void *decompress = library ? dlsym(library, "libdeflate_gzip_decompress") : NULL;
    if (!alloc || !release || !decompress)
        Py_RETURN_FALSE;
    *(void **)&alloc_decompressor = alloc;
    *(void **)&free_decompressor = release;
    *(void **)&gzip_decompress = decompress;
    Py_RETURN_TRUE;
}

static PyMethodDef methods[] = {
    {"decode_stamps", (PyCFunction)(void (*)(void))decode_stamps, METH_FASTCALL, decode_stamps_doc},
    {"use_libdeflate", use_libdeflate, METH_O, use_libdeflate_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_stamps", "The compiled way from stamps to pixels.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__stamps(void)
{
    return PyModuleDef_Init(&definition);
}
