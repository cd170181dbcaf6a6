/* Reads the arrays that Python passes to the compiled functions. */

#ifndef BROKER_FILTER_ARRAYS_H
#define BROKER_FILTER_ARRAYS_H

#include <Python.h>
#include <stdint.h>

/* Gets the buffer of a C-contiguous array with this shape (-1 stands for any length) and items of `itemsize` bytes.
 * Returns -1 with an exception on failure. */
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
    PyErr_SetString(PyExc_ValueError, "an array has a wrong shape or type");
    return -1;
}

#endif
