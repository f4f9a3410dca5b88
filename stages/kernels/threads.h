// OpenMP, or one thread where the compiler has none: its pragmas are ignored then.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
#endif
