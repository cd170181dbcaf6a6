/* Runs a program of `plan.py` over an Avro body: the compiled form of the interpreter in `walk.py`.
 *
 * The bytes and the program are both untrusted: each read and each write is checked against its buffer. The walk does not
 * recurse, allocates no memory and does not hold the GIL. A change here must also be made in `walk.py`. */

#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { SKIP, SKIP_LONG, SKIP_BYTES, FLOAT, DOUBLE, BOOLEAN, LONG, LETTER, CONSTANT, ID, BYTES, BEGIN, END, OPTION, UNION,
       JUMP, ARRAY, MAP, ROW };

enum { DONE, TRUNCATED, CORRUPT, NO_ROOM, BAD_PROGRAM };

#define MAX_LOOPS 16
#define SKIPPED_OPTION 5 /* words of OPTION b 2, SKIP n */
#define MISSING_ID INT64_MIN

typedef struct {
    int64_t left; /* remaining items of the current block, including the current item */
    int32_t start, end;
    double *scalars;
    int64_t n_scalars;
} Loop;

typedef struct {
    const int32_t *program;
    int64_t n_words;
    const uint8_t *body;
    int64_t n_bytes, start;
    double *scalars;
    int64_t n_scalars;
    int64_t *ids;
    int64_t n_ids;
    int64_t *spans; /* pairs of start and end */
    int64_t n_spans;
    double *points; /* rows of n_columns values */
    int64_t n_columns, max_points, n_points;
    int64_t position; /* output: where the record ends, or where the walk failed */
} Walk;

static inline int read_long(const uint8_t **at, const uint8_t *end, int64_t *value)
{
    const uint8_t *p = *at;
    uint64_t bits = 0;
    for (int shift = 0; shift < 70; shift += 7) {
        if (p == end)
            return TRUNCATED;
        uint8_t byte = *p++;
        if (shift == 63 && byte > 1)
            return CORRUPT; /* more than 64 bits */
        bits |= (uint64_t)(byte & 0x7F) << shift;
        if (byte < 0x80) {
            *at = p;
            *value = (int64_t)(bits >> 1) ^ -(int64_t)(bits & 1);
            return DONE;
        }
    }
    return CORRUPT;
}

/* Reads the length of length-prefixed bytes and checks that they are complete; then `*at` is the start of the bytes. */
static inline int read_length(const uint8_t **at, const uint8_t *end, int64_t *length)
{
    const uint8_t *p = *at;
    int failed = read_long(&p, end, length);
    if (failed)
        return failed;
    if (*length < 0)
        return CORRUPT;
    if (*length > end - p)
        return TRUNCATED;
    *at = p;
    return DONE;
}

/* Reads the item count of the next block of an array or a map; 0 means that there is no further block. */
static inline int read_block(const uint8_t **at, const uint8_t *end, int64_t *count)
{
    int64_t size;
    int failed = read_long(at, end, count);
    if (failed || *count >= 0)
        return failed;
    if (*count == INT64_MIN)
        return CORRUPT;
    *count = -*count; /* a negative count is followed by the size of the block in bytes */
    failed = read_long(at, end, &size);
    return failed ? failed : size < 0 ? CORRUPT : DONE;
}

static inline float read_float(const uint8_t *p)
{
    uint32_t bits = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline double read_double(const uint8_t *p)
{
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++)
        bits |= (uint64_t)p[i] << 8 * i;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define FAIL(status) do { failed = (status); goto out; } while (0)
#define TRY(call) do { if ((failed = (call))) goto out; } while (0)
#define NEED_WORDS(n) do { if (n_words - pc < (n)) FAIL(BAD_PROGRAM); } while (0)
#define NEED_BYTES(n) do { if (end - p < (n)) FAIL(TRUNCATED); } while (0)
#define SCALAR(value) do { \
        int32_t slot = program[pc + 1]; \
        if (slot < 0 || slot >= n_scalars) FAIL(BAD_PROGRAM); \
        scalars[slot] = (value); \
    } while (0)
#define SPAN(offset, value) do { \
        int32_t slot = program[pc + 1]; \
        if (slot < 0 || slot >= w->n_spans) FAIL(BAD_PROGRAM); \
        w->spans[2 * slot + (offset)] = (value); \
    } while (0)

static int walk(Walk *w)
{
    const int32_t *program = w->program;
    const uint8_t *body = w->body, *p = body + w->start, *end = body + w->n_bytes;
    const int64_t n_words = w->n_words;
    double *scalars = w->scalars;
    int64_t n_scalars = w->n_scalars;
    int64_t pc = 0, stop = n_words, value;
    Loop loops[MAX_LOOPS];
    int depth = 0, failed = DONE;

    for (int64_t i = 0; i < n_scalars; i++)
        scalars[i] = NAN;
    for (int64_t i = 0; i < w->n_ids; i++)
        w->ids[i] = MISSING_ID;
    for (int64_t i = 0; i < 2 * w->n_spans; i++)
        w->spans[i] = -1;

    for (;;) {
        while (pc == stop) {
            if (!depth)
                goto out;
            Loop *loop = &loops[depth - 1];
            if (--loop->left == 0)
                TRY(read_block(&p, end, &loop->left));
            if (loop->left) {
                pc = loop->start;
                break;
            }
            scalars = loop->scalars;
            n_scalars = loop->n_scalars;
            depth--;
            stop = depth ? loops[depth - 1].end : n_words;
        }
        NEED_WORDS(1);
        switch (program[pc]) {
        case SKIP:
            NEED_WORDS(2);
            if (program[pc + 1] < 0)
                FAIL(BAD_PROGRAM);
            NEED_BYTES(program[pc + 1]);
            p += program[pc + 1];
            pc += 2;
            break;
        case SKIP_LONG:
            TRY(read_long(&p, end, &value));
            pc += 1;
            break;
        case SKIP_BYTES:
            TRY(read_length(&p, end, &value));
            p += value;
            pc += 1;
            break;
        case FLOAT:
            NEED_WORDS(2);
            NEED_BYTES(4);
            SCALAR((double)read_float(p));
            p += 4;
            pc += 2;
            break;
        case DOUBLE:
            NEED_WORDS(2);
            NEED_BYTES(8);
            SCALAR(read_double(p));
            p += 8;
            pc += 2;
            break;
        case BOOLEAN:
            NEED_WORDS(2);
            NEED_BYTES(1);
            SCALAR(*p != 0);
            p += 1;
            pc += 2;
            break;
        case LONG:
            NEED_WORDS(2);
            TRY(read_long(&p, end, &value));
            SCALAR((double)value);
            pc += 2;
            break;
        case LETTER:
            NEED_WORDS(2);
            TRY(read_length(&p, end, &value));
            if (value)
                SCALAR(*p);
            p += value;
            pc += 2;
            break;
        case CONSTANT:
            NEED_WORDS(3);
            SCALAR(program[pc + 2]);
            pc += 3;
            break;
        case ID: {
            NEED_WORDS(2);
            int32_t slot = program[pc + 1];
            if (slot < 0 || slot >= w->n_ids)
                FAIL(BAD_PROGRAM);
            TRY(read_long(&p, end, &value));
            w->ids[slot] = value;
            pc += 2;
            break;
        }
        case BYTES:
            NEED_WORDS(2);
            TRY(read_length(&p, end, &value));
            SPAN(0, p - body);
            p += value;
            SPAN(1, p - body);
            pc += 2;
            break;
        case BEGIN:
            NEED_WORDS(2);
            SPAN(0, p - body);
            pc += 2;
            break;
        case END:
            NEED_WORDS(2);
            SPAN(1, p - body);
            pc += 2;
            break;
        case OPTION:
            /* Most of a history are nullable numbers that nobody wants: step over a row of them here. What is not
             * common, as an index of two bytes or the end of the body, is left to the general code. */
            while (stop - pc >= SKIPPED_OPTION && program[pc] == OPTION && program[pc + 2] == 2 &&
                   program[pc + 3] == SKIP && program[pc + 4] >= 0 && p < end && (*p == 0 || *p == 2)) {
                int64_t size = 1 + (*p >> 1 == program[pc + 1] ? 0 : (int64_t)program[pc + 4]);
                if (end - p < size)
                    break;
                p += size;
                pc += SKIPPED_OPTION;
            }
            if (pc == stop || program[pc] != OPTION)
                break;
            NEED_WORDS(3);
            if (program[pc + 2] < 0)
                FAIL(BAD_PROGRAM);
            TRY(read_long(&p, end, &value));
            if (value != 0 && value != 1)
                FAIL(CORRUPT);
            pc += value == program[pc + 1] ? 3 + (int64_t)program[pc + 2] : 3;
            break;
        case UNION: {
            NEED_WORDS(2);
            int64_t n_branches = program[pc + 1];
            NEED_WORDS(2 + n_branches);
            TRY(read_long(&p, end, &value));
            if (value < 0 || value >= n_branches)
                FAIL(CORRUPT);
            int32_t jump = program[pc + 2 + value];
            if (jump < 2)
                FAIL(BAD_PROGRAM);
            pc += jump;
            break;
        }
        case JUMP:
            NEED_WORDS(2);
            if (program[pc + 1] < 0)
                FAIL(BAD_PROGRAM);
            pc += 2 + (int64_t)program[pc + 1];
            break;
        case MAP:
        case ARRAY: {
            NEED_WORDS(2);
            int64_t length = program[pc + 1];
            if (length < 0 || pc + 2 + length > stop || depth == MAX_LOOPS)
                FAIL(BAD_PROGRAM);
            TRY(read_block(&p, end, &value));
            while (value && !length)
                TRY(read_block(&p, end, &value));
            pc += 2;
            if (value) {
                loops[depth++] = (Loop){value, (int32_t)pc, (int32_t)(pc + length), scalars, n_scalars};
                stop = pc + length;
            } else
                pc += length;
            break;
        }
        case ROW:
            NEED_WORDS(2);
            if (w->n_points == w->max_points)
                FAIL(NO_ROOM);
            scalars = w->points + w->n_points++ * w->n_columns;
            n_scalars = w->n_columns;
            scalars[0] = program[pc + 1];
            for (int64_t i = 1; i < n_scalars; i++)
                scalars[i] = NAN;
            pc += 2;
            break;
        default:
            FAIL(BAD_PROGRAM);
        }
        if (pc > stop)
            FAIL(BAD_PROGRAM);
    }
out:
    w->position = p - body;
    return failed;
}

/* Gets a writable, C-contiguous buffer of 8-byte items with `n_dimensions`; returns -1 with an exception on failure. */
static int get_columns(PyObject *object, Py_buffer *view, int n_dimensions)
{
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0)
        return -1;
    if (view->ndim == n_dimensions && view->itemsize == 8 && (uintptr_t)view->buf % 8 == 0)
        return 0;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_ValueError, "walk: an output array has a wrong shape or type");
    return -1;
}

PyDoc_STRVAR(walk_doc, "The compiled form of `walk.walk_python`. It releases the GIL during the walk.");

static PyObject *walk_call(PyObject *module, PyObject *const *args, Py_ssize_t n_args)
{
    (void)module;
    PyObject *result = NULL;
    Py_buffer program, body, scalars, ids, spans, points;

    if (n_args != 9) {
        PyErr_SetString(PyExc_TypeError, "walk: takes 9 arguments");
        return NULL;
    }
    Py_ssize_t start = PyLong_AsSsize_t(args[2]), row = PyLong_AsSsize_t(args[3]), n_points = PyLong_AsSsize_t(args[8]);
    if (PyErr_Occurred())
        return NULL;
    if (PyObject_GetBuffer(args[0], &program, PyBUF_C_CONTIGUOUS) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[1], &body, PyBUF_SIMPLE) < 0)
        goto release_program;
    if (get_columns(args[4], &scalars, 2) < 0)
        goto release_body;
    if (get_columns(args[5], &ids, 2) < 0)
        goto release_scalars;
    if (get_columns(args[6], &spans, 3) < 0)
        goto release_ids;
    if (get_columns(args[7], &points, 2) < 0)
        goto release_spans;
    if (program.itemsize != 4 || (uintptr_t)program.buf % 4 || program.len / 4 > INT32_MAX || start < 0 ||
        start > body.len || row < 0 || row >= scalars.shape[0] || row >= ids.shape[0] || row >= spans.shape[0] ||
        spans.shape[2] != 2 || points.shape[1] < 1 || n_points < 0 || n_points > points.shape[0]) {
        PyErr_SetString(PyExc_ValueError, "walk: the arguments do not fit each other");
        goto release_points;
    }

    Walk w = {
        .program = program.buf, .n_words = program.len / 4,
        .body = body.buf, .n_bytes = body.len, .start = start,
        .scalars = (double *)scalars.buf + row * scalars.shape[1], .n_scalars = scalars.shape[1],
        .ids = (int64_t *)ids.buf + row * ids.shape[1], .n_ids = ids.shape[1],
        .spans = (int64_t *)spans.buf + row * spans.shape[1] * 2, .n_spans = spans.shape[1],
        .points = points.buf, .n_columns = points.shape[1], .max_points = points.shape[0], .n_points = n_points,
    };
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = walk(&w);
    Py_END_ALLOW_THREADS
    if (status == BAD_PROGRAM)
        PyErr_Format(PyExc_ValueError, "walk: the program is not valid for these outputs");
    else
        result = Py_BuildValue("(inn)", status, (Py_ssize_t)w.position, (Py_ssize_t)w.n_points);

release_points:
    PyBuffer_Release(&points);
release_spans:
    PyBuffer_Release(&spans);
release_ids:
    PyBuffer_Release(&ids);
release_scalars:
    PyBuffer_Release(&scalars);
release_body:
    PyBuffer_Release(&body);
release_program:
    PyBuffer_Release(&program);
    return result;
}

static PyMethodDef methods[] = {
    {"walk", (PyCFunction)(void (*)(void))walk_call, METH_FASTCALL, walk_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_walk", "The compiled walker of Avro bodies.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__walk(void)
{
    return PyModuleDef_Init(&definition);
}
