// The Python module lexibit._kernels: addresses and sizes in, results into memory that the caller made.
// lexibit/ops/native.py has checked all but the origins, which are checked here.
#define PY_SSIZE_T_CLEAN
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <cstring>
#include <memory>
#include <new>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "assign.h"
#include "outliers.h"
#include "parallel.h"
#include "weight.h"

namespace {

using lexibit::Activation;
using lexibit::BFloat16Kernels;
using lexibit::Float32Kernels;
using lexibit::Int8Kernels;
using lexibit::Weight;

struct InstructionSet {
  const char* name;
  const Float32Kernels* float32;
  const BFloat16Kernels* bfloat16;  // or null
  const Int8Kernels* int8;          // or null
  bool here;  // whether this CPU has it, and the system lets it be used; or a test assumes it
};

#if defined(__x86_64__) && !defined(LEXIBIT_WITHOUT_AMX)
// Whether the CPU has tiles and both of their products, and the system lets this process use them, which must be asked for.
bool amx_permitted() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // as arch/x86/include/uapi/asm/prctl.h names them
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (~d & (bf16 | tile | int8)) == 0 && !syscall(SYS_arch_prctl, request_permission, tile_data);
#else
  return false;
#endif
}
#endif

// The best first.
InstructionSet* instruction_sets() {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                 __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  static const bool avx512bf16 = avx512vnni && __builtin_cpu_supports("avx512bf16");
#endif
  static InstructionSet all[] = {
#if defined(__x86_64__)
#if !defined(LEXIBIT_WITHOUT_AMX)
      {"amx", &lexibit::avx2_kernels, &lexibit::amx_bf16_kernels, &lexibit::amx_kernels, avx512bf16 && amx_permitted()},
#endif
      {"avx512bf16", &lexibit::avx2_kernels, &lexibit::avx512bf16_kernels, &lexibit::avx512vnni_kernels, avx512bf16},
      {"avx512vnni", &lexibit::avx2_kernels, nullptr, &lexibit::avx512vnni_kernels, avx512vnni},
      {"avx2", &lexibit::avx2_kernels, nullptr, &lexibit::avx2_int8_kernels, avx2},
#endif
      {nullptr, nullptr, nullptr, nullptr, false},
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

PyObject* assume(PyObject*, PyObject* name) {
  for (InstructionSet* one = instruction_sets(); one->name; ++one)
    if (!PyUnicode_CompareWithASCIIString(name, one->name)) one->here = true;
  Py_RETURN_NONE;
}

PyObject* supports(PyObject*, PyObject* name) {
  for (const InstructionSet* one = instruction_sets(); one->name; ++one) {
    if (!one->here || PyUnicode_CompareWithASCIIString(name, one->name)) continue;
    return Py_BuildValue("{s:O,s:O,s:O,s:O}", "float32", Py_True, "bfloat16", one->bfloat16 ? Py_True : Py_False,
                         "int8", one->int8 ? Py_True : Py_False, "encoder",
                         one->int8 && one->int8->encoder ? Py_True : Py_False);
  }
  return PyDict_New();
}

PyObject* parallel(PyObject*, PyObject*) { return PyBool_FromLong(lexibit::parallel_available()); }

template <class T>
T* address(long long number) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(number));
}

const InstructionSet* set_named(const char* name) {
  for (const InstructionSet* one = instruction_sets(); one->name; ++one)
    if (!std::strcmp(one->name, name) && one->here) return one;
  PyErr_Format(PyExc_ValueError, "no kernels for %s here", name);
  return nullptr;
}

// A weight from its tuple, as native.py makes it; false, with an error set, if it is none.
bool weight_of(PyObject* tuple, Weight& weight) {
  int form, bits;
  long long codes, code_bytes, levels, rows, columns, block_rows, block_columns, origins, extra_rows, extra_columns, mask;
  if (!PyArg_ParseTuple(tuple, "LLLiiLLLLLLLL", &codes, &code_bytes, &levels, &form, &bits, &rows, &columns,
                        &block_rows, &block_columns, &origins, &extra_rows, &extra_columns, &mask))
    return false;
  weight = {address<std::uint8_t>(codes), code_bytes, address<float>(levels), static_cast<lexibit::Form>(form), bits,
            rows, columns, block_rows, block_columns, (columns + block_columns - 1) / block_columns,
            address<std::int32_t>(origins), extra_rows, extra_columns, address<std::uint8_t>(mask)};
  // in a weight that was not read from a file nobody has looked at these
  const long long own = extra_rows ? weight.own_rows() : weight.own_columns();
  for (long long i = 0; i < extra_rows + extra_columns; ++i)
    if (weight.origins[i] < 0 || weight.origins[i] >= own) {
      PyErr_Format(PyExc_IndexError, "origin %d of %lld rows or columns", weight.origins[i], own);
      return false;
    }
  return true;
}

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
  const char* name;
  int threads;
  PyObject* tuple;
  long long out;
  Weight weight;
  if (!PyArg_ParseTuple(arguments, "siO!L", &name, &threads, &PyTuple_Type, &tuple, &out)) return nullptr;
  const InstructionSet* set = set_named(name);
  if (!set || !weight_of(tuple, weight)) return nullptr;
  return unlocked([&] { set->float32->decode(weight, address<float>(out), threads); });
}

PyObject* embedding(PyObject*, PyObject* arguments) {
  const char* name;
  int threads;
  PyObject* tuple;
  long long ids, count, out;
  Weight weight;
  if (!PyArg_ParseTuple(arguments, "siO!LLL", &name, &threads, &PyTuple_Type, &tuple, &ids, &count, &out)) return nullptr;
  const InstructionSet* set = set_named(name);
  if (!set || !weight_of(tuple, weight)) return nullptr;
  return unlocked([&] {
    set->float32->embedding(weight, address<std::int64_t>(ids), count, address<float>(out), threads);
  });
}

PyObject* linear(PyObject*, PyObject* arguments) {
  const char* name;
  int threads, transposed;
  PyObject* tuple;
  long long x, tokens, bias, out;
  Weight weight;
  if (!PyArg_ParseTuple(arguments, "siO!LLLLp", &name, &threads, &PyTuple_Type, &tuple, &x, &tokens, &bias, &out,
                        &transposed))
    return nullptr;
  const InstructionSet* set = set_named(name);
  if (!set || !weight_of(tuple, weight)) return nullptr;
  return unlocked([&] {
    set->float32->linear(weight, address<float>(x), tokens, address<float>(bias), address<float>(out), transposed, threads);
  });
}

PyObject* linear_rounded(PyObject*, PyObject* arguments) {
  const char *name, *compute;
  int threads, activation;
  PyObject* tuple;
  long long x, tokens, bias, out;
  Weight weight;
  if (!PyArg_ParseTuple(arguments, "ssiO!LLLiL", &name, &compute, &threads, &PyTuple_Type, &tuple, &x, &tokens, &bias,
                        &activation, &out))
    return nullptr;
  const InstructionSet* set = set_named(name);
  if (!set || !weight_of(tuple, weight)) return nullptr;
  lexibit::RoundedLinear linear = nullptr;
  if (set->int8 && !std::strcmp(compute, "int8")) linear = set->int8->linear;
  if (set->bfloat16 && !std::strcmp(compute, "bfloat16")) linear = set->bfloat16->linear;
  if (!linear) return PyErr_Format(PyExc_ValueError, "%s has no kernels for %s", name, compute);
  return unlocked([&] {
    linear(weight, address<float>(x), tokens, address<float>(bias), static_cast<Activation>(activation),
           address<float>(out), threads);
  });
}

PyObject* add_outliers(PyObject*, PyObject* arguments) {
  int threads, transposed;
  long long values, gaps, count, rows, columns, x, tokens, out;
  if (!PyArg_ParseTuple(arguments, "iLLLLLLLLp", &threads, &values, &gaps, &count, &rows, &columns, &x, &tokens, &out,
                        &transposed))
    return nullptr;
  const lexibit::Outliers outliers = {address<float>(values), address<std::uint16_t>(gaps), count, rows, columns};
  bool inside = true;
  PyObject* done = unlocked([&] {
    inside = lexibit::add_outliers(outliers, address<float>(x), tokens, address<float>(out), transposed, threads);
  });
  if (done && !inside) {
    // in a weight that was not read from a file nobody has looked at these before
    Py_DECREF(done);
    return PyErr_Format(PyExc_IndexError, "outliers behind the last of %lld weights", rows * columns);
  }
  return done;
}

// A linear layer from (weight, bias, outliers, gaps, their count).
bool linear_of(PyObject* tuple, lexibit::Linear& linear) {
  PyObject* weight;
  long long bias, values, gaps, count;
  if (!PyArg_ParseTuple(tuple, "O!LLLL", &PyTuple_Type, &weight, &bias, &values, &gaps, &count)) return false;
  linear.bias = address<float>(bias);
  if (!weight_of(weight, linear.weight)) return false;
  linear.outliers = {address<float>(values), address<std::uint16_t>(gaps), count, linear.weight.rows, linear.weight.columns};
  return true;
}

// LayerNorm's weight, bias and epsilon.
bool norm_of(PyObject* tuple, lexibit::Norm& norm) {
  long long weight, bias;
  if (!PyArg_ParseTuple(tuple, "LLf", &weight, &bias, &norm.epsilon)) return false;
  norm.weight = address<float>(weight), norm.bias = address<float>(bias);
  return true;
}

// The rows of some embeddings added up, each of (weight, ids), and LayerNorm of that.
PyObject* embed(PyObject*, PyObject* arguments) {
  constexpr Py_ssize_t most = 3;
  const char* name;
  int threads;
  PyObject *tuples, *norm_tuple;
  long long tokens, out;
  lexibit::Norm norm;
  if (!PyArg_ParseTuple(arguments, "siO!LO!L", &name, &threads, &PyTuple_Type, &tuples, &tokens, &PyTuple_Type,
                        &norm_tuple, &out) ||
      !norm_of(norm_tuple, norm))
    return nullptr;
  const InstructionSet* set = set_named(name);
  if (!set) return nullptr;
  if (!set->int8 || !set->int8->add_norm) return PyErr_Format(PyExc_ValueError, "%s has no kernel for embeddings", name);
  Weight weight[most];
  const std::int64_t* ids[most];
  const Py_ssize_t count = PyTuple_Size(tuples);
  if (count < 2 || count > most) return PyErr_Format(PyExc_ValueError, "%zd embeddings, not 2 or 3", count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* tuple;
    long long of;
    if (!PyArg_ParseTuple(PyTuple_GetItem(tuples, i), "O!L", &PyTuple_Type, &tuple, &of) || !weight_of(tuple, weight[i]))
      return nullptr;
    ids[i] = address<std::int64_t>(of);
  }
  const std::int64_t columns = weight[0].own_columns(), numbers = tokens * columns;
  bool inside = true;
  long long row = 0, of_rows = 0;  // the one looked at last, and what there are
  PyObject* done = unlocked([&] {
    // what was checked, whoever writes to ids meanwhile
    const std::unique_ptr<std::int64_t[]> rows(new std::int64_t[static_cast<std::size_t>(count * tokens)]);
    for (Py_ssize_t i = 0; i < count; ++i)
      for (std::int64_t t = 0; t < tokens; ++t) {
        row = rows[static_cast<std::size_t>(i * tokens + t)] = ids[i][t], of_rows = weight[i].own_rows();
        inside = row >= 0 && row < of_rows;
        if (!inside) return;
      }
    const std::unique_ptr<float[]> more(new float[static_cast<std::size_t>(numbers)]);
    float* const sum = address<float>(out);
    set->float32->embedding(weight[0], rows.get(), tokens, sum, threads);
    for (Py_ssize_t i = 1; i < count; ++i) {
      set->float32->embedding(weight[i], rows.get() + i * tokens, tokens, more.get(), threads);
      if (i + 1 < count)
        for (std::int64_t j = 0; j < numbers; ++j) sum[j] += more[static_cast<std::size_t>(j)];
    }
    set->int8->add_norm(sum, more.get(), norm, tokens, columns, sum, threads);
  });
  if (done && !inside) {
    Py_DECREF(done);
    return PyErr_Format(PyExc_IndexError, "row %lld of %lld rows", row, of_rows);
  }
  return done;
}

// A layer from (linear layers, norms, heads, scaling, activation).
bool layer_of(PyObject* tuple, lexibit::EncoderLayer& layer) {
  PyObject *linears, *norms, *part[6], *norm[2];
  long long heads;
  int activation;
  if (!PyArg_ParseTuple(tuple, "O!O!Lfi", &PyTuple_Type, &linears, &PyTuple_Type, &norms, &heads, &layer.scaling,
                        &activation) ||
      !PyArg_ParseTuple(linears, "O!O!O!O!O!O!", &PyTuple_Type, &part[0], &PyTuple_Type, &part[1], &PyTuple_Type, &part[2],
                        &PyTuple_Type, &part[3], &PyTuple_Type, &part[4], &PyTuple_Type, &part[5]) ||
      !PyArg_ParseTuple(norms, "O!O!", &PyTuple_Type, &norm[0], &PyTuple_Type, &norm[1]))
    return false;
  layer.heads = heads, layer.activation = static_cast<Activation>(activation);
  lexibit::Linear* const layers[] = {&layer.query, &layer.key, &layer.value, &layer.output, &layer.up, &layer.down};
  for (int i = 0; i < 6; ++i)
    if (!linear_of(part[i], *layers[i])) return false;
  return norm_of(norm[0], layer.attention_norm) && norm_of(norm[1], layer.norm);
}

PyObject* encoder(PyObject*, PyObject* arguments) {
  const char* name;
  int threads;
  PyObject* tuples;
  long long x, texts, length, mask, mask_rows, out;
  if (!PyArg_ParseTuple(arguments, "siO!LLLLLL", &name, &threads, &PyTuple_Type, &tuples, &x, &texts, &length, &mask,
                        &mask_rows, &out))
    return nullptr;
  const InstructionSet* set = set_named(name);
  if (!set) return nullptr;
  if (!set->int8 || !set->int8->encoder)
    return PyErr_Format(PyExc_ValueError, "%s has no kernel for layers of an encoder", name);
  const Py_ssize_t count = PyTuple_Size(tuples);
  const std::unique_ptr<lexibit::EncoderLayer[]> layers(new (std::nothrow) lexibit::EncoderLayer[static_cast<std::size_t>(count)]);
  if (!layers) return PyErr_NoMemory();
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!layer_of(PyTuple_GetItem(tuples, i), layers[static_cast<std::size_t>(i)])) return nullptr;
  bool inside = true;
  PyObject* done = unlocked([&] {
    inside = set->int8->encoder(layers.get(), count, address<float>(x), texts, length, address<float>(mask), mask_rows,
                                address<float>(out), threads);
  });
  if (done && !inside) {
    Py_DECREF(done);
    return PyErr_Format(PyExc_IndexError, "outliers behind the last weight of a layer");
  }
  return done;
}

PyObject* assign(PyObject*, PyObject* arguments) {
  int threads, count;
  long long levels, limits, names, of_row, of_column, rows, columns, coupling, values, target, codes, change;
  if (!PyArg_ParseTuple(arguments, "iLLLiLLLLLLLLL", &threads, &levels, &limits, &names, &count, &of_row, &of_column,
                        &rows, &columns, &coupling, &values, &target, &codes, &change))
    return nullptr;
  const lexibit::Ladders ladders = {address<float>(levels), address<float>(limits), address<std::uint8_t>(names), count};
  return unlocked([&] {
    lexibit::assign(ladders, address<std::int32_t>(of_row), address<std::int32_t>(of_column), rows, columns,
                    address<float>(coupling), address<float>(values), address<float>(target),
                    address<std::uint8_t>(codes), address<float>(change), threads);
  });
}

// Whether each of some dicts still has a value under a name, or none where that is None. In Python this takes longer than a
// small layer.
PyObject* unchanged(PyObject*, PyObject* arguments) {
  PyObject *dicts, *names, *values;
  if (!PyArg_ParseTuple(arguments, "O!O!O!", &PyTuple_Type, &dicts, &PyTuple_Type, &names, &PyTuple_Type, &values))
    return nullptr;
  const Py_ssize_t count = PyTuple_Size(dicts);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* found = PyDict_GetItemWithError(PyTuple_GetItem(dicts, i), PyTuple_GetItem(names, i));
    if (!found && PyErr_Occurred()) return nullptr;
    if ((found ? found : Py_None) != PyTuple_GetItem(values, i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"available", available, METH_NOARGS, "The instruction sets of this CPU that there are kernels for."},
    {"assume", assume, METH_O, "Takes an instruction set as one of this CPU, for tests that emulate it."},
    {"supports", supports, METH_O, "What an instruction set of this CPU has kernels for, by name; empty if it is not here."},
    {"parallel", parallel, METH_NOARGS, "Whether torch's threads can be used."},
    {"unchanged", unchanged, METH_VARARGS, "(dicts, names, values)"},
    {"decode", decode, METH_VARARGS, "(name, threads, weight, out)"},
    {"embedding", embedding, METH_VARARGS, "(name, threads, weight, ids, count, out)"},
    {"linear", linear, METH_VARARGS, "(name, threads, weight, x, tokens, bias, out, transposed)"},
    {"linear_rounded", linear_rounded, METH_VARARGS,
     "(name, compute, threads, weight, x, tokens, bias, activation, out)"},
    {"add_outliers", add_outliers, METH_VARARGS,
     "(threads, values, gaps, count, rows, columns, x, tokens, out, transposed)"},
    {"assign", assign, METH_VARARGS,
     "(threads, levels, limits, names, count, of_row, of_column, rows, columns, coupling, values, target, codes, change)"},
    {"embed", embed, METH_VARARGS, "(name, threads, embeddings, tokens, norm, out)"},
    {"encoder", encoder, METH_VARARGS, "(name, threads, layers, x, texts, length, mask, mask_rows, out)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "lexibit._kernels", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&module); }
