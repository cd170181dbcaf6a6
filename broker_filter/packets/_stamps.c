/* Pixels of the plain FITS images that surveys publish, from file bytes into a slot: the quick way of `stamps.py`, which
 * reads everything that is not taken here, with the same result where both can.
 *
 * The bytes are untrusted: every read is checked against their number. Allocates nothing. */

#include <Python.h>
#include <stdint.h>
#include <string.h>

#define CARD 80
#define BLOCK 2880
#define MAX_HEADER (4 * BLOCK)
#define MAX_LENGTH 100000 /* pixels along an axis: products of two stay far from overflow */

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

PyDoc_STRVAR(place_image_doc, "place_image(fits, slot, centred) -> (y0, x0, height, width), or None where stamps.py must look.");

static PyObject *place_image(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    (void)module;
    if (n_args != 3) {
        PyErr_SetString(PyExc_TypeError, "place_image: 3 arguments");
        return NULL;
    }
    int centred = PyObject_IsTrue(args[2]);
    if (centred < 0)
        return NULL;
    PyObject *result = NULL;
    Py_buffer fits, slot;
    if (PyObject_GetBuffer(args[0], &fits, PyBUF_SIMPLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[1], &slot, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0)
        goto release_fits;
    if (slot.ndim != 2 || slot.itemsize != 4 || (uintptr_t)slot.buf % 4) {
        PyErr_SetString(PyExc_ValueError, "place_image: the slot is no float32[S, S]");
        goto release_slot;
    }

    int64_t height, width;
    int64_t start = read_header(fits.buf, fits.len, &height, &width);
    if (start < 0 || height > MAX_LENGTH || width > MAX_LENGTH || start + 4 * height * width > fits.len)
        goto leave;
    int64_t y0, x0, top, left, n_rows, n_columns, stride = slot.shape[1];
    place_axis(height, slot.shape[0], centred, &y0, &top, &n_rows);
    place_axis(width, stride, centred, &x0, &left, &n_columns);
    const uint8_t *first = (const uint8_t *)fits.buf + start + 4 * (top * width + left);
    uint32_t *out = slot.buf;
    if (n_rows < slot.shape[0] || n_columns < stride)
        memset(out, 0, (size_t)slot.len);
    /* One look at the middle spares nearly every stamp the look at all pixels. */
    int finite = is_finite(read_pixel(first + 4 * (n_rows / 2 * width + n_columns / 2)));
    for (int64_t y = 0; y < n_rows; y++) {
        const uint8_t *from = first + 4 * y * width;
        uint32_t *to = out + (y0 + y) * stride + x0;
        for (int64_t x = 0; x < n_columns; x++)
            to[x] = read_pixel(from + 4 * x);
        for (int64_t x = 0; !finite && x < n_columns; x++)
            finite = is_finite(to[x]);
    }
    if (finite)
        result = Py_BuildValue("(nnnn)", (Py_ssize_t)y0, (Py_ssize_t)x0, (Py_ssize_t)n_rows, (Py_ssize_t)n_columns);

leave:
    if (!result && !PyErr_Occurred())
        result = Py_NewRef(Py_None);
release_slot:
    PyBuffer_Release(&slot);
release_fits:
    PyBuffer_Release(&fits);
    return result;
}

static PyMethodDef methods[] = {
    {"place_image", (PyCFunction)(void (*)(void))place_image, METH_FASTCALL, place_image_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_stamps", "The compiled way from plain FITS images to pixels.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__stamps(void)
{
    return PyModuleDef_Init(&definition);
}
