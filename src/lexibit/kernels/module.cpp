// The Python module lexibit._kernels: addresses and sizes in, results into memory that the caller made.
// lexibit/ops/native.py has checked all but the origins, which are checked here.
#define PY_SSIZE_T_CLEAN
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <cstring>
#include <new>

#include "parallel.h"
#include "weight.h"

namespace {

using lexibit::Kernels;
using lexibit::Weight;

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool here;  // whether this CPU has it
};

// The best first.
const InstructionSet* instruction_sets() {
  static const InstructionSet all[] = {
#if defined(__x86_64__)
      {"avx2", &lexibit::avx2_kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {nullptr, nullptr, false},
  };
  return all;
}

PyObject* available(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const InstructionSet* one = instruction_sets(); names && one->name; ++one) {
    if (!one->here) continue;
    PyObject* name = PyUnicode_FromString(one->name);
    if (!name || PyList_Append(names, name)) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* parallel(PyObject*, PyObject*) { return PyBool_FromLong(lexibit::parallel_available()); }

template <class T>
T* address(long long number) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(number));
}

// An instruction set's name, a weight, and how many threads: the first arguments of all.
struct Call {
  const Kernels* kernels = nullptr;
  Weight weight{};
  int threads = 1;
};

// How a Call stands in the formats of PyArg_ParseTuple, and what takes it.
#define LEXIBIT_CALL "si(LLLiiLLLLLLLL)"

struct Parsed {
  const char* name;
  int threads, form, bits;
  long long codes, code_bytes, levels, rows, columns, block_rows, block_columns, origins, extra_rows,
      extra_columns, mask;

  bool into(Call& call) const {
    for (const InstructionSet* one = instruction_sets(); one->name; ++one)
      if (!std::strcmp(one->name, name) && one->here) call.kernels = one->kernels;
    if (!call.kernels) {
      PyErr_Format(PyExc_ValueError, "no kernels for %s here", name);
      return false;
    }
    call.threads = threads;
    call.weight = {address<std::uint8_t>(codes), code_bytes, address<float>(levels),
                   static_cast<lexibit::Form>(form), bits, rows, columns, block_rows, block_columns,
                   address<std::int32_t>(origins), extra_rows, extra_columns, address<std::uint8_t>(mask)};
    // in a weight that was not read from a file nobody has looked at these
    const long long own = call.weight.extra_rows ? call.weight.own_rows() : call.weight.own_columns();
    for (long long i = 0; i < extra_rows + extra_columns; ++i)
      if (call.weight.origins[i] < 0 || call.weight.origins[i] >= own) {
        PyErr_Format(PyExc_IndexError, "origin %d of %lld rows or columns", call.weight.origins[i], own);
        return false;
      }
    return true;
  }
};

#define LEXIBIT_PARSED(p)                                                                                    \
  &p.name, &p.threads, &p.codes, &p.code_bytes, &p.levels, &p.form, &p.bits, &p.rows, &p.columns,           \
      &p.block_rows, &p.block_columns, &p.origins, &p.extra_rows, &p.extra_columns, &p.mask

// Runs without the interpreter's lock.
template <class Work>
PyObject* unlocked(Work&& work) {
  bool memory = true;
  Py_BEGIN_ALLOW_THREADS
  try {
    work();
  } catch (const std::bad_alloc&) {
    memory = false;
  }
  Py_END_ALLOW_THREADS
  if (!memory) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject* decode(PyObject*, PyObject* arguments) {
  Parsed p;
  Call call;
  long long out;
  if (!PyArg_ParseTuple(arguments, LEXIBIT_CALL "L", LEXIBIT_PARSED(p), &out) || !p.into(call)) return nullptr;
  return unlocked([&] { call.kernels->decode(call.weight, address<float>(out), call.threads); });
}

PyObject* embedding(PyObject*, PyObject* arguments) {
  Parsed p;
  Call call;
  long long ids, count, out;
  if (!PyArg_ParseTuple(arguments, LEXIBIT_CALL "LLL", LEXIBIT_PARSED(p), &ids, &count, &out) || !p.into(call))
    return nullptr;
  return unlocked([&] {
    call.kernels->embedding(call.weight, address<std::int64_t>(ids), count, address<float>(out), call.threads);
  });
}

PyObject* linear(PyObject*, PyObject* arguments) {
  Parsed p;
  Call call;
  long long x, tokens, bias, out;
  int transposed;
  if (!PyArg_ParseTuple(arguments, LEXIBIT_CALL "LLLLp", LEXIBIT_PARSED(p), &x, &tokens, &bias, &out,
                        &transposed) ||
      !p.into(call))
    return nullptr;
  return unlocked([&] {
    call.kernels->linear(call.weight, address<float>(x), tokens, address<float>(bias), address<float>(out),
                         transposed, call.threads);
  });
}

PyMethodDef methods[] = {
    {"available", available, METH_NOARGS, "The instruction sets of this CPU that there are kernels for."},
    {"parallel", parallel, METH_NOARGS, "Whether torch's threads can be used."},
    {"decode", decode, METH_VARARGS, "(name, threads, weight, out)"},
    {"embedding", embedding, METH_VARARGS, "(name, threads, weight, ids, count, out)"},
    {"linear", linear, METH_VARARGS, "(name, threads, weight, x, tokens, bias, out, transposed)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "lexibit._kernels", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&module); }
