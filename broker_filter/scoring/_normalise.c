/* Normalises pixels: compiled twins of `preprocess.normalise_numpy` and `snr.snr_numpy` with bit-identical results.
 *
 * The GIL is released. The time is proportional to the number of pixels, whatever their values. Built without fused
 * multiply-add (-ffp-contract=off), because numpy rounds each operation. */

#include <Python.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../packets/_arrays.h"

/* numpy's pairwise summation (`pairwise_sum` in its loops): blocks of more than PAIRED pixels are halved, and each block is
 * summed in LANES partial sums. */
#define LANES 8
#define PAIRED 128

static float sum_of_squares(const float *pixels, Py_ssize_t n)
{
    if (n > PAIRED) {
        Py_ssize_t half = n / 2 / LANES * LANES;
        return sum_of_squares(pixels, half) + sum_of_squares(pixels + half, n - half);
    }
    float sum = 0;
    Py_ssize_t i = 0;
    if (n >= LANES) {
        float lanes[LANES] = {0};
        for (; i + LANES <= n; i += LANES)
            for (int lane = 0; lane < LANES; lane++)
                lanes[lane] += pixels[i + lane] * pixels[i + lane];
        sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    }
    for (; i < n; i++)
        sum += pixels[i] * pixels[i];
    return sum;
}

static void normalise_pixels(const float *pixels, float *normalised, Py_ssize_t n)
{
    float norm = sqrtf(sum_of_squares(pixels, n));
    if (!isfinite(norm)) {
        for (Py_ssize_t i = 0; i < n; i++)
            normalised[i] = isnan(pixels[i]) ? 0 : fminf(fmaxf(pixels[i], -FLT_MAX), FLT_MAX);
        pixels = normalised;
        norm = sqrtf(sum_of_squares(pixels, n));
    }
    if (norm == 0)
        norm = 1;
    for (Py_ssize_t i = 0; i < n; i++)
        normalised[i] = pixels[i] / norm;
}

/* The constants of `snr.py`. */
#define MAX_FLUX_BITS 0x7149F2CA /* of the float 1e30 */
#define MAX_SNR_BITS 0x4E6E6B28  /* of the float 1e9 */
#define SIGMA_PER_MAD 1.4826f
#define CLIP (3.0f * SIGMA_PER_MAD)
#define LN2 0.6931472f
#define SQRT_HALF_BITS 0x3F3504F3
#define MANTISSA_BITS 23
#define MAGNITUDE 0x7FFFFFFF /* all bits but the sign */
#define INFINITY_BITS 0x7F800000
#define ONE_BITS 0x3F800000

/* A function that is compiled for a plain processor and for one with AVX2, with all functions that it calls. */
#define INLINED static inline __attribute__((always_inline))

INLINED int32_t bits_of(float value)
{
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINED float float_of(int32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* An integer with the order of the floating-point numbers. */
INLINED int32_t key_of(float value)
{
    int32_t bits = bits_of(value);
    return bits ^ (bits >> 31 & MAGNITUDE);
}

/* The lower median of n finite values without -0; 0 if there are none. `keys`: room for n integers.
 *
 * It is found bit by bit: each pass over the keys, which compilers vectorise, counts those below a bound. The time does not
 * depend on the values. */
INLINED float lower_median(const float *values, int32_t *keys, Py_ssize_t n)
{
    if (!n)
        return 0;
    int32_t rank = (int32_t)((n - 1) / 2), found = INT32_MIN; /* the largest key with at most `rank` keys below it */
    for (Py_ssize_t i = 0; i < n; i++)
        keys[i] = key_of(values[i]);
    for (uint32_t step = 1u << 31; step; step >>= 1) {
        int32_t bound = (int32_t)((uint32_t)found + step), n_below = 0;
        for (Py_ssize_t i = 0; i < n; i++)
            n_below += keys[i] < bound;
        if (n_below <= rank)
            found = bound;
    }
    return float_of(found ^ (found >> 31 & MAGNITUDE));
}

/* The clipped median of n values, and 1.4826 x their median absolute deviation if `noise` is not NULL. Overwrites the
 * arrays. */
INLINED float background_of(float *values, float *deviations, int32_t *keys, Py_ssize_t n, float *noise)
{
    float median = lower_median(values, keys, n);
    for (Py_ssize_t i = 0; i < n; i++)
        deviations[i] = fabsf(values[i] - median);
    float limit = CLIP * lower_median(deviations, keys, n);
    Py_ssize_t n_kept = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        values[n_kept] = values[i];
        n_kept += deviations[i] <= limit;
    }
    median = lower_median(values, keys, n_kept);
    if (noise) {
        for (Py_ssize_t i = 0; i < n_kept; i++)
            deviations[i] = fabsf(values[i] - median);
        *noise = SIGMA_PER_MAD * lower_median(deviations, keys, n_kept);
        if (!(*noise > 0))
            *noise = 1;
    }
    return median;
}

/* The functions below have no branches, and compare floats as integers, so that compilers vectorise them. */

INLINED int is_measured(float pixel)
{
    return (bits_of(pixel) & MAGNITUDE) < MAX_FLUX_BITS;
}

/* Whether a variance is positive and finite. */
INLINED int is_known(float variance)
{
    int32_t bits = bits_of(variance);
    return (bits > 0) & (bits < INFINITY_BITS);
}

/* arcsinh of a value from 0 to MAX_SNR. */
INLINED float arcsinh(float size)
{
    float whole = size + sqrtf(size * size + 1.0f);
    int32_t exponent = (bits_of(whole) - SQRT_HALF_BITS) >> MANTISSA_BITS;
    float mantissa = float_of(bits_of(whole) - (exponent << MANTISSA_BITS));
    float t = (mantissa - 1.0f) / (mantissa + 1.0f), square = t * t;
    float series = (float)(2.0 / 9) * square;
    series = (series + (float)(2.0 / 7)) * square;
    series = (series + (float)(2.0 / 5)) * square;
    series = (series + (float)(2.0 / 3)) * square;
    return (float)exponent * LN2 + t * (series + 2.0f);
}

/* Normalises n adjacent pixels. */
INLINED void compress(const float *pixels, const float *variance, float background, float noise,
                      float *restrict normalised, Py_ssize_t n)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        int32_t measured = -is_measured(pixels[i]), known = -is_known(variance[i]); /* all bits, or none */
        float value = float_of(bits_of(pixels[i]) & measured) + 0.0f - background;
        float deviation = sqrtf(float_of((bits_of(variance[i]) & known) | (ONE_BITS & ~known)));
        float ratio = value / float_of((bits_of(deviation) & known) | (bits_of(noise) & ~known));
        int32_t size = bits_of(ratio) & MAGNITUDE, sign = bits_of(ratio) & ~MAGNITUDE;
        float compressed = arcsinh(float_of(size < MAX_SNR_BITS ? size : MAX_SNR_BITS));
        normalised[i] = float_of((bits_of(compressed) | sign) & measured);
    }
}

/* Normalises a stamp of size x size pixels. `values`, `deviations`, `keys`: room for as many pixels. */
#define SNR_STAMP_ARGUMENTS \
    const float *pixels, const float *variance, const int16_t *box, int subtracted, float padding, Py_ssize_t size, \
        float *values, float *deviations, int32_t *keys, float *normalised
INLINED void snr_stamp_inlined(SNR_STAMP_ARGUMENTS)
{
    Py_ssize_t y0 = box[0], x0 = box[1], height = box[2], width = box[3], n = 0;
    int all_known = 1;
    for (Py_ssize_t y = y0; y < y0 + height; y++)
        for (Py_ssize_t i = y * size + x0; i < y * size + x0 + width; i++) {
            int measured = is_measured(pixels[i]);
            values[n] = pixels[i] + 0.0f; /* -0 becomes 0 */
            n += measured;
            all_known &= (!measured) | is_known(variance[i]);
        }
    float noise = 1, background = 0;
    if (subtracted || !all_known)
        background = background_of(values, deviations, keys, n, all_known ? NULL : &noise);
    if (!subtracted)
        background = 0;
    if (height < size || width < size)
        for (Py_ssize_t i = 0; i < size * size; i++)
            normalised[i] = padding;
    for (Py_ssize_t y = y0; y < y0 + height; y++) {
        Py_ssize_t first = y * size + x0;
        compress(pixels + first, variance + first, background, noise, normalised + first, width);
    }
}

typedef void SnrStamp(SNR_STAMP_ARGUMENTS);

static void snr_stamp(SNR_STAMP_ARGUMENTS)
{
    snr_stamp_inlined(pixels, variance, box, subtracted, padding, size, values, deviations, keys, normalised);
}

#ifdef __x86_64__
__attribute__((target("avx2"))) static void snr_stamp_avx2(SNR_STAMP_ARGUMENTS)
{
    snr_stamp_inlined(pixels, variance, box, subtracted, padding, size, values, deviations, keys, normalised);
}
#define BEST_SNR_STAMP (__builtin_cpu_supports("avx2") ? snr_stamp_avx2 : snr_stamp)
#else
#define BEST_SNR_STAMP snr_stamp
#endif

static int is_float_array(const Py_buffer *view)
{
    return view->itemsize == sizeof(float) && (uintptr_t)view->buf % sizeof(float) == 0;
}

PyDoc_STRVAR(normalise_doc, "normalise(images, normalised, length): see `preprocess.normalise_numpy`.");

static PyObject *normalise(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    (void)module;
    if (n_args != 3) {
        PyErr_SetString(PyExc_TypeError, "normalise: takes two arrays and a length");
        return NULL;
    }
    Py_ssize_t length = PyLong_AsSsize_t(args[2]);
    if (length == -1 && PyErr_Occurred())
        return NULL;
    PyObject *result = NULL;
    Py_buffer images, normalised;
    if (PyObject_GetBuffer(args[0], &images, PyBUF_C_CONTIGUOUS) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[1], &normalised, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0)
        goto release_images;
    Py_ssize_t n_pixels = images.len / (Py_ssize_t)sizeof(float);
    if (!is_float_array(&images) || !is_float_array(&normalised) || images.len != normalised.len || length < 1 ||
        n_pixels % length) {
        PyErr_SetString(PyExc_ValueError, "normalise: arrays must be float32, of one size, a multiple of length");
        goto release_normalised;
    }

    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t start = 0; start < n_pixels; start += length)
        normalise_pixels((const float *)images.buf + start, (float *)normalised.buf + start, length);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);

release_normalised:
    PyBuffer_Release(&normalised);
release_images:
    PyBuffer_Release(&images);
    return result;
}

PyDoc_STRVAR(snr_doc, "snr(pixels, variance, boxes, subtracted, padding, normalised): see `snr.snr_numpy`.");

static int boxes_fit(const int16_t *boxes, Py_ssize_t n, Py_ssize_t size)
{
    for (; n; n--, boxes += 4)
        if (boxes[0] < 0 || boxes[1] < 0 || boxes[2] < 0 || boxes[3] < 0 || boxes[0] + boxes[2] > size ||
            boxes[1] + boxes[3] > size)
            return 0;
    return 1;
}

static PyObject *snr(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    (void)module;
    if (n_args != 6) {
        PyErr_SetString(PyExc_TypeError, "snr: takes 5 arrays and a number");
        return NULL;
    }
    float padding = (float)PyFloat_AsDouble(args[4]);
    if (PyErr_Occurred())
        return NULL;
    PyObject *result = NULL;
    Py_buffer pixels, variance, boxes, subtracted, normalised;
    if (get_array(args[0], &pixels, 3, (Py_ssize_t[]){-1, -1, -1}, 4, 0) < 0)
        return NULL;
    Py_ssize_t n = pixels.shape[0], size = pixels.shape[1], n_pixels = size * size;
    const Py_ssize_t shape[] = {n, size, size};
    if (get_array(args[1], &variance, 3, shape, 4, 0) < 0)
        goto release_pixels;
    if (get_array(args[2], &boxes, 2, (Py_ssize_t[]){n, 4}, 2, 0) < 0)
        goto release_variance;
    if (get_array(args[3], &subtracted, 1, (Py_ssize_t[]){n}, 1, 0) < 0)
        goto release_boxes;
    if (get_array(args[5], &normalised, 3, shape, 4, PyBUF_WRITABLE) < 0)
        goto release_subtracted;
    if (pixels.shape[2] != size || !boxes_fit(boxes.buf, n, size)) {
        PyErr_SetString(PyExc_ValueError, "snr: the stamps must be squares, and the boxes must lie in them");
        goto release_normalised;
    }
    float *values = malloc((size_t)n_pixels * 2 * sizeof *values + 1);
    int32_t *keys = malloc((size_t)n_pixels * sizeof *keys + 1);
    SnrStamp *best = BEST_SNR_STAMP;
    if (!values || !keys) {
        free(values);
        free(keys);
        PyErr_NoMemory();
        goto release_normalised;
    }

    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t k = 0; k < n; k++)
        best((const float *)pixels.buf + k * n_pixels, (const float *)variance.buf + k * n_pixels,
             (const int16_t *)boxes.buf + 4 * k, ((const uint8_t *)subtracted.buf)[k], padding, size, values,
             values + n_pixels, keys, (float *)normalised.buf + k * n_pixels);
    Py_END_ALLOW_THREADS
    free(values);
    free(keys);
    result = Py_NewRef(Py_None);

release_normalised:
    PyBuffer_Release(&normalised);
release_subtracted:
    PyBuffer_Release(&subtracted);
release_boxes:
    PyBuffer_Release(&boxes);
release_variance:
    PyBuffer_Release(&variance);
release_pixels:
    PyBuffer_Release(&pixels);
    return result;
}

static PyMethodDef methods[] = {
    {"normalise", (PyCFunction)(void (*)(void))normalise, METH_FASTCALL, normalise_doc},
    {"snr", (PyCFunction)(void (*)(void))snr, METH_FASTCALL, snr_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_normalise", "Compiled normalisation of images.", 0, methods, slots, NULL,
    NULL, NULL,
};

PyMODINIT_FUNC PyInit__normalise(void)
{
    return PyModuleDef_Init(&definition);
}
