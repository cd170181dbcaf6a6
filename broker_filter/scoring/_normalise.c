/* Divides pixels by their norms: a compiled `preprocess.normalise_numpy` with bit-identical results.
 *
 * The GIL is released. Built without fused multiply-add (-ffp-contract=off), because numpy rounds each operation. */

#include <Python.h>
#include <float.h>
#include <math.h>
#include <stdint.h>

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

static PyMethodDef methods[] = {
    {"normalise", (PyCFunction)(void (*)(void))normalise, METH_FASTCALL, normalise_doc},
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
