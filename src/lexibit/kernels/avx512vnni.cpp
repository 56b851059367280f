// Products in int8, for AVX-512 with VNNI and VBMI.
#if defined(__x86_64__)
#include "dot_products.h"
#include "encoder.h"

namespace lexibit {

const Int8Kernels avx512vnni_kernels = {linear<DotProducts>, encoder<DotProducts>, add_norms};

}  // namespace lexibit

#endif
